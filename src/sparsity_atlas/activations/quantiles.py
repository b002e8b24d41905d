"""Exact quantiles of magnitudes that are seen a block at a time: two passes, and a few counts in memory."""

from __future__ import annotations

import numpy as np

_HALF = 16
_BINS = 1 << _HALF


class MagnitudeQuantiles:
    """Quantiles of the magnitudes of float32 values.

    A quantile is the smallest magnitude that at least this share of all entries does not exceed (the inverse
    of the empirical distribution). As unsigned integers the bits of magnitudes have their order: `first`
    counts their upper halves, `second` the lower halves of those with the upper half that a quantile has.
    Both see all blocks; in between nothing but these counts is kept, half a megabyte for each quantile.
    """

    def __init__(self, shares: tuple[float, ...]) -> None:
        """Ask for some quantiles.

        Args:
            shares: of the entries, each in (0, 1].
        """
        self._shares = shares
        self._upper = np.zeros(_BINS, dtype=np.int64)
        self._lower: dict[int, np.ndarray] = {}
        self._wanted: list[tuple[int, int]] = []  # upper half, and rank among those that have it

    def first(self, magnitude: np.ndarray) -> None:
        """Count a block of float32 that are not negative."""
        self._upper += np.bincount((_bits(magnitude) >> _HALF), minlength=_BINS)

    def second(self, magnitude: np.ndarray) -> None:
        """Count the same block again, after `first` has seen all."""
        if not self._wanted:
            ends = np.cumsum(self._upper)
            for share in self._shares:
                rank = max(int(np.ceil(share * ends[-1])), 1)
                upper = int(np.searchsorted(ends, rank))
                before = int(ends[upper - 1]) if upper else 0
                self._wanted.append((upper, rank - before))
                self._lower[upper] = np.zeros(_BINS, dtype=np.int64)
        bits = _bits(magnitude)
        upper_half = bits >> _HALF
        for upper, counts in self._lower.items():
            counts += np.bincount(bits[upper_half == upper] & (_BINS - 1), minlength=_BINS)

    def found(self) -> list[float]:
        """The quantiles, after `second` has seen all."""
        bits = [
            (upper << _HALF) + int(np.searchsorted(np.cumsum(self._lower[upper]), rank))
            for upper, rank in self._wanted
        ]
        values: list[float] = np.array(bits, dtype=np.uint32).view(np.float32).tolist()
        return values


def _bits(magnitude: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(magnitude, dtype=np.float32).view(np.uint32).ravel()
