"""A criterion at every place of a site: what it knows of each, from weights and from a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsity_atlas.criteria.base import Criterion, SequenceCriterion
from sparsity_atlas.criteria.place import places, state_name
from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from sparsity_atlas.criteria.place import State
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

    Raises:
        AtlasError: a rule of the user's own whose masks depend on more than the row, or whose `bind` gives
            no rule; a rule that looks at sequences or at weights, where experts have theirs.
    """
    for place in places(parts, site) if isinstance(criterion, SequenceCriterion) else ():
        if not place.part.rows_are_tokens(place.tensor):
            raise AtlasError(
                f"{type(criterion).__name__}: looks at whole sequences, of which an expert sees some tokens "
                f"(layer {place.layer}, '{place.tensor}'): not supported for routed experts"
            )
    bound = {
        place.key: criterion.bind(
            place,
            {
                name: value.to(place.device)
                for name, value in (calibration or {}).get(state_name(place.key), {}).items()
            },
        )
        for place in places(parts, site)
    }
    for key, rule in bound.items():
        if not isinstance(rule, Criterion):
            raise AtlasError(
                f"{criterion.file}: {type(criterion).__name__}.bind: expected the criterion for layer "
                f"{key.layer}, '{key.tensor}', found {rule!r}"
            )
    if criterion.file is not None and not criterion.tried:
        from sparsity_atlas.criteria.check import check_masks

        first = next(places(parts, site))
        check_masks(bound[first.key], criterion.file, first.width, first.device)
        criterion.tried = True
    return bound
