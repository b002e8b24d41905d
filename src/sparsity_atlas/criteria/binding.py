"""A criterion at every place of a site: what it knows of each, from weights and from a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.criteria.place import places, state_name
from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from sparsity_atlas.criteria.place import State
    from sparsity_atlas.sites.ffn import FFN


def bind_all(
    criterion: Criterion, ffns: list[FFN], site: str, calibration: Mapping[str, State] | None = None
) -> dict[tuple[int, str], Criterion]:
    """A criterion bound to every place of a site, by layer and tensor.

    Args:
        criterion: the rule.
        ffns: all FFNs of one model.
        site: where.
        calibration: state of each place under its `state_name`; None for a rule without.

    Raises:
        AtlasError: a rule of the user's own whose masks depend on more than the row, or whose `bind` gives
            no rule.
    """
    bound = {
        (place.layer, place.tensor): criterion.bind(
            place,
            {
                name: value.to(place.device)
                for name, value in (calibration or {}).get(state_name(place), {}).items()
            },
        )
        for place in places(ffns, site)
    }
    for place, rule in bound.items():
        if not isinstance(rule, Criterion):
            raise AtlasError(
                f"{criterion.file}: {type(criterion).__name__}.bind: expected the criterion for layer "
                f"{place[0]}, '{place[1]}', found {rule!r}"
            )
    if criterion.file is not None and not criterion.tried:
        from sparsity_atlas.criteria.check import check_masks

        first = next(places(ffns, site))
        check_masks(bound[first.layer, first.tensor], criterion.file, first.width, first.device)
        criterion.tried = True
    return bound
