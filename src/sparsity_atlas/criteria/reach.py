"""What a level asks of a calibrated criterion at a place, and what it got on the calibration's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.place import State

# What is worth telling: a point of sparsity, or half a percent of a CETT.
POINT, SHARE = 0.01, 0.005


class Reach(NamedTuple):
    """A target and what was reached.

    of: whose: the share of zeros at the site, or the layer's CETT.
    """

    of: Literal["sparsity", "cett"]
    target: float
    reached: float

    @property
    def missed(self) -> bool:
        """Whether the two differ by more than is worth telling: entries that tie stay or go together."""
        return missed(self.of, self.target, self.reached)


def missed(of: str, target: float, reached: float) -> bool:
    """See `Reach.missed`."""
    return abs(reached - target) > (POINT if of == "sparsity" else SHARE * target)


def misses(
    criterion: Criterion, states: Mapping[str, State], levels: Sequence[str]
) -> Iterator[tuple[str, str, Reach]]:
    """Level, place and what was reached, where that is not the target."""
    for level in levels:
        for place, state in states.items():
            found = criterion.reach(state, float(level))
            if found is not None and found.missed:
                yield level, place, found
