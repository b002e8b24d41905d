"""Thresholds by the error that dropping makes: knots where it was measured, as many as it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# The mildest target that is met; of a milder one only what costs less than a measured error is dropped.
LOWEST = 5e-4
# Knots lie at most this far apart, as a ratio of their errors,
WIDEST = 1.2
# and so close that the error at the middle of two of them is what was expected, up to this share of it.
TOLERANCE = 2e-3
# How far single scores may let errors between two knots scatter about what is expected, as a share.
SCATTER = 3e-3
# Errors that are measured at most: some hundred of millions of scores, nearly all of a few thousand.
MOST = 5000
# Where to look first: shares of the scores that are no zeros.
FIRST = sorted({share for k in range(1, 12) for share in (2.0**-k, 1 - 2.0**-k)})


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Thresholds over the error that dropping all scores below them makes.

    Attributes:
        error: float64 [knots], rising; the first is that of dropping exact zeros alone.
        threshold: float64 [knots], rising.
        gap: bool [knots], whether no error between a knot's and the next one's is met: scores that tie, or a
            sample so small that single ones count.
    """

    error: np.ndarray
    threshold: np.ndarray
    gap: np.ndarray

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ErrorTable:
        """The table that `state` wrote."""
        error, threshold, gap = (
            state[name].cpu().double().numpy() for name in ("error", "threshold", "gap")
        )
        return cls(error, threshold, gap > 0)

    def state(self) -> dict[str, Tensor]:
        """The table as float32 tensors."""
        named = {"error": self.error, "threshold": self.threshold, "gap": self.gap}
        return {name: torch.from_numpy(one.astype(np.float32)) for name, one in named.items()}

    def at(self, target: float) -> tuple[float, float]:
        """The threshold for a target, and the error that it makes: the target where that can be met.

        Args:
            target: an error; 0 drops nothing, 1 everything, and so does what no threshold costs.
        """
        if target == 0:
            return 0.0, 0.0
        if target >= min(self.error[-1], 1):
            return float("inf"), float(self.error[-1])
        knot = int(np.searchsorted(self.error, target, side="right")) - 1
        (low, high), (low_error, high_error) = (
            one[knot : knot + 2] for one in (self.threshold, self.error)
        )
        if self.gap[knot] or self.error[knot] == target:
            return float(low), float(self.error[knot])
        return _between(low_error, high_error, low, high, target), target


def _between(low_error: float, high_error: float, low: float, high: float, target: float) -> float:
    """The threshold that is expected for a target between two knots: errors are nearly powers of it.

    No other knot counts, so that what was seen to hold of two of them keeps holding.
    """
    share = np.log(target / low_error) / np.log(high_error / low_error)
    return float(np.clip(low * (high / low) ** share, low, high))


def tabulate(scores: Tensor, error: Callable[[float], float]) -> ErrorTable:
    """Measure errors until every target from `LOWEST` on is met, or seen not to be.

    Args:
        scores: of the sample's entries, any shape, not negative.
        error: of dropping all entries with a score below a threshold.
    """
    ranked = np.sort(scores.flatten().float().cpu().numpy())
    ranked = ranked[np.searchsorted(ranked, 0, side="right") :].astype(np.float64)
    if not len(ranked):
        return ErrorTable(np.zeros(1), np.ones(1), np.ones(1, dtype=bool))
    search = _Search(ranked, error)
    while new := search.wanted():
        for place in new:
            search.measure(place)
    return search.table()


class _Search:
    """The places between two of the ranked scores where the error was measured.

    A place is the rank of the first score that stays: all below it are dropped.
    """

    def __init__(self, ranked: np.ndarray, error: Callable[[float], float]) -> None:
        self._ranked, self._error = ranked, error
        self._measured = {0: 0.0}
        self._pairs: dict[int, tuple[int, int, float]] = {}  # what a place was to be the middle of
        self._good: set[tuple[int, int]] = set()
        for share in FIRST:
            self.measure(self._first_of(int(share * len(ranked))))
        self.measure(len(ranked))

    def _first_of(self, place: int) -> int:
        """The first of the scores that tie with that at a place."""
        return int(np.searchsorted(self._ranked, self._ranked[place]))

    def threshold(self, place: int) -> float:
        """Between two scores, so that no rounding moves it beyond either."""
        if place == 0:
            return float(0.5 * self._ranked[0])
        if place == len(self._ranked):
            return float(1.0001 * self._ranked[-1])
        return float(np.sqrt(self._ranked[place - 1] * self._ranked[place]))

    def measure(self, place: int) -> None:
        """Measure the error at a place, and see whether it was expected there."""
        if place in self._measured:
            return
        found = self._measured[place] = self._error(self.threshold(place))
        if place in self._pairs:
            low, high, expected = self._pairs[place]
            if abs(found - expected) <= TOLERANCE * expected:
                self._good |= {(low, place), (place, high)}

    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        """Places and errors that rise together; of equal errors the last place: what is free is dropped."""
        places = np.array(sorted(self._measured))
        errors = np.maximum.accumulate([self._measured[place] for place in places])
        last = np.append(np.diff(errors) > 0, True)
        # Where the error falls again, the place that reached it first.
        own = np.array([self._measured[place] for place in places]) == errors
        last = np.maximum.accumulate(np.where(own, np.arange(len(own)), 0))[last]
        return places[last], errors[last]

    def wanted(self) -> list[int]:
        """Places to be measured next; none when all is known."""
        if len(self._measured) >= MOST:
            return []
        places, errors = self._knots()
        table = self.table()
        # What was measured between two knots costs no more than the lower one.
        measured = np.array(sorted(self._measured))
        furthest = measured[np.searchsorted(measured, places[1:]) - 1]
        new = []
        for k in range(len(places) - 1):
            pair, low, high = (places[k], places[k + 1]), errors[k], errors[k + 1]
            if pair in self._good or high <= LOWEST:
                continue
            inside = furthest[k]
            after = int(np.searchsorted(self._ranked, self._ranked[inside], side="right"))
            if after >= pair[1]:
                continue
            last = self._first_of(pair[1] - 1)
            if inside != pair[0] or low < LOWEST / 10:
                new.append(self._first_of((after + last) // 2))
                continue
            middle = float(np.sqrt(low * high))
            threshold = _between(low, high, table.threshold[k], table.threshold[k + 1], middle)
            place = min(max(int(np.searchsorted(self._ranked, threshold)), after), last)
            # Where single scores count, the middle says little of what lies beside it.
            if high <= WIDEST * low and _scatter(low, high, pair[1] - pair[0]) <= SCATTER:
                self._pairs[place] = (*pair, middle)
            new.append(place)
        return new[: MOST - len(self._measured)]

    def table(self) -> ErrorTable:
        """What is known so far."""
        places, errors = self._knots()
        gap = [pair not in self._good for pair in pairwise(places)]
        return ErrorTable(
            errors, np.array([self.threshold(place) for place in places]), np.array([*gap, True])
        )


def _scatter(low: float, high: float, scores: int) -> float:
    """How far errors may lie from the line between two of them: so many scores, drawn at random.

    Of a Brownian bridge, which the line's deviations are, half of √n steps is rarely exceeded by more than
    a half; to that comes the step in which a threshold lies.
    """
    steps = float(np.log(high / low)) / scores
    return float(steps * (0.75 * scores**0.5 + 1))
