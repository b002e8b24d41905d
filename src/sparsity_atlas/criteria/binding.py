"""A criterion at every place of a site: what it knows of each, from weights and from a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.criteria.expert_rules import ExpertRules
from sparsity_atlas.criteria.place import places, state_name
from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from sparsity_atlas.criteria.place import Place, State
    from sparsity_atlas.sites.part import Part
    from sparsity_atlas.terms import PlaceKey


def bind_all(
    criterion: Criterion,
    parts: Sequence[Part],
    site: str,
    calibration: Mapping[str, State] | None = None,
) -> dict[PlaceKey, Criterion]:
    """A criterion bound to every place of a site.

    Args:
        criterion: the rule.
        parts: of one model.
        site: where.
        calibration: state of each place under its `state_name`; None for a rule without.

    Returns:
        By place the rule that `bind` gave, or, of experts with rules of their own, `ExpertRules`.

    Raises:
        AtlasError: a rule of the user's own whose masks depend on more than the row, or whose `bind` gives
            no rule; one that cannot work at a place.
    """
    check_places(criterion, parts, site, type(criterion).__name__)
    return {place.key: _bind(criterion, place, calibration or {}) for place in places(parts, site)}


def check_places(criterion: Criterion, parts: Sequence[Part], site: str, name: str) -> None:
    """Refuse a criterion that cannot work at some place of a site.

    Args:
        criterion: the rule.
        parts: of one model.
        site: where.
        name: how the message calls it.

    Raises:
        AtlasError: why it cannot.
    """
    for place in places(parts, site):
        why = criterion.refuses(place)
        if why is not None:
            where = f"'{place.tensor}' of layer {place.layer}'s {place.part.name}"
            raise AtlasError(f"{name}: cannot be used at {where}: {why}")


def _bind(criterion: Criterion, place: Place, states: Mapping[str, State]) -> Criterion:
    """A criterion bound to one place, or to each of the experts there."""

    @cache
    def state(name: str) -> State:
        return {key: value.to(place.device) for key, value in states.get(name, {}).items()}

    name = state_name(place.key)
    experts = place.experts if criterion.differs_by_expert else ()
    if not experts:
        return _checked(criterion, place, criterion.bind(place, state(name)))
    rules = []
    for number, expert in enumerate(experts):
        own = state_name(place.key, number)
        rule = criterion.bind(expert, state(own if own in states else name))
        rules.append(_checked(criterion, expert, rule))
    return ExpertRules(rules)


def _checked(criterion: Criterion, place: Place, rule: Criterion) -> Criterion:
    """What `bind` gave, tried once where it is the user's own."""
    if not isinstance(rule, Criterion):
        raise AtlasError(
            f"{criterion.file}: {type(criterion).__name__}.bind: expected the criterion for layer "
            f"{place.layer}, '{place.tensor}', found {rule!r}"
        )
    if criterion.file is not None and not criterion.tried:
        from sparsity_atlas.criteria.check import check_masks

        check_masks(rule, criterion.file, place.width, place.device)
        criterion.tried = True
    return rule
