"""Points of a curve at which is timed, and rows of the table of what was timed there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.decoding.trial import Time, realised
from sparsity_atlas.decoding.vector import looks_at_entries
from sparsity_atlas.speed.speed_table import FIXED, FOUND, OK, REFUSED
from sparsity_atlas.terms import PlaceKey

if TYPE_CHECKING:
    from sparsity_atlas.kernels.definition import Threshold
    from sparsity_atlas.sites.part import Part
    from sparsity_atlas.speed.text_vectors import Seen


class Constant(Criterion):
    """A threshold that is there beforehand, whatever the level."""

    def __init__(self, rule: Threshold) -> None:
        self._rule = rule

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        return self._rule


class Way(NamedTuple):
    """How thresholds come about.

    Attributes:
        threshold: `FOUND` at each token, or `FIXED` beforehand.
        bound: the rule of each place.
        seen: the text's vectors, and what these rules keep of them.
    """

    threshold: str
    bound: Mapping[PlaceKey, Criterion]
    seen: Seen

    def rules(self, part: Part, tensors: Sequence[str]) -> dict[str, Threshold]:
        """Of some tensors of a part."""
        found = {}
        for tensor in tensors:
            place = PlaceKey(part.layer, part.name, tensor)
            rule = self.bound[place].threshold(self.seen.level, part.size(tensor))
            found[tensor] = rule.to(self.seen.kept[place].device)
        return found


@dataclass(frozen=True)
class Point:
    """A sparsity at which is timed.

    Attributes:
        wanted: the sparsity.
        of: what point of the curve it is; empty: none.
        seen: the text at the level that drops so much.
        bound: the criterion at each place.
    """

    wanted: float
    of: str
    seen: Seen
    bound: Mapping[PlaceKey, Criterion]

    @cached_property
    def ways(self) -> list[Way]:
        """How thresholds come about: the criterion's own way, and where that is another one, constants.

        Those drop of each place as much of the text as the criterion does.
        """
        place, rule = next(iter(self.bound.items()))
        width = self.seen.kept[place].shape[-1]
        if looks_at_entries(rule.threshold(self.seen.level, width)):
            return [Way(FIXED, self.bound, self.seen)]
        constants = self.seen.constants()
        fixed = {place: Constant(one) for place, one in constants.items()}
        return [
            Way(FOUND, self.bound, self.seen),
            Way(FIXED, fixed, self.seen.by(constants)),
        ]

    def row(self, way: Way, took: Time, share: float) -> dict[str, Any]:
        """What a row says of a time at this point.

        Args:
            way: how thresholds came about.
            took: the time.
            share: of the weights that are timed, that need not be read.
        """
        return {
            **{"of": self.of, "wanted": self.wanted, "level": self.seen.level},
            **{"threshold": way.threshold, "sparsity": self.seen.sparsity, "unread_share": share},
            **{"sparse_us": took.median, "sparse_spread_us": took.spread},
        }


@dataclass
class Dense:
    """The best time in which nothing is left out."""

    times: list[tuple[Time, str]] = field(default_factory=list)

    def add(self, by: str, took: Time) -> None:
        """One more way."""
        self.times.append((took, by))

    def finished(
        self, rows: Sequence[dict[str, Any]], weight_bytes: int
    ) -> Iterator[dict[str, Any]]:
        """The rows beside that time, by what is timed in the same way from the least sparsity on.

        Rows in which nothing is unread are a dense way, too.

        Args:
            rows: of one thing that is timed, by any thresholds.
            weight_bytes: of the weights that it reads where nothing is left out.
        """
        nothing = [
            (Time(row["sparse_us"], row["sparse_spread_us"]), "own")
            for row in rows
            if row["unread_share"] == 0
        ]
        best, by = min([*self.times, *nothing], key=lambda one: one[0].median)
        made = []
        for row in rows:
            share, took = row["unread_share"], row["sparse_us"]
            made.append(
                {
                    **row,
                    **{"dense_us": best.median, "dense_spread_us": best.spread, "dense_by": by},
                    "bytes_read": round((1 - share) * weight_bytes),
                    "speedup": best.median / took,
                    "ideal_speedup": 1 / (1 - share),
                    "realised_share": realised(best.median, took, share),
                    **{"status": OK, "reason": ""},
                }
            )
        for threshold in dict.fromkeys(row["threshold"] for row in made):
            own = [row for row in made if row["threshold"] == threshold]
            own.sort(key=lambda row: (row["sparsity"], row["of"]))
            pays = pays_from([(row["sparsity"], row["speedup"]) for row in own])
            yield from ({**row, "pays_from": pays} for row in own)


def pays_from(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity from which on nothing is slower than dense, on straight lines; None: there is none.

    Args:
        points: sparsity and speed-up, in the order of sparsity.
    """
    beyond: float | None = None
    following: tuple[float, float] | None = None
    for sparsity, speedup in reversed(points):
        if speedup < 1:
            if following is not None:
                at, gain = following
                beyond = sparsity + (1 - speedup) / (gain - speedup) * (at - sparsity)
            return beyond
        beyond, following = sparsity, (sparsity, speedup)
    return beyond


def refused(timed: str, reason: str) -> dict[str, Any]:
    """The row of something that could not be timed."""
    return {"timed": timed, "status": REFUSED, "reason": reason}
