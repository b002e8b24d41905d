"""The tokens of requests as arrays: their order, and what is common to those that follow each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

# Pairs of requests that are compared at once, so that what is made beside them stays small.
AT_ONCE = 4096


class Scored(Protocol):
    """A request, as `forest.Request`."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def scored(self) -> int: ...
    @property
    def owner(self) -> int: ...


class Sequences:
    """The tokens of requests in one array.

    Attributes:
        flat: int64, one request behind the other, with the last token of each, which is not run.
        starts: of each request in `flat`, int64 [requests].
        lengths: tokens that are run, int64 [requests].
        scored: tokens predicted at the end of each, int64 [requests].
        owners: int64 [requests].
    """

    def __init__(self, requests: Sequence[Scored]) -> None:
        counts = np.array([len(one.tokens) for one in requests])
        every = itertools.chain.from_iterable(one.tokens for one in requests)
        self.flat = np.fromiter(every, np.int64, counts.sum())
        self.starts = counts.cumsum() - counts
        self.lengths = counts - 1
        self.scored = np.array([one.scored for one in requests])
        self.owners = np.array([one.owner for one in requests])

    def in_order(self) -> np.ndarray:
        """The requests' numbers in the order of the tokens that they run; equal ones as they came."""
        # Compared as bytes, the highest first, numbers of one size are in their own order.
        text = self.flat.astype(">u4").tobytes()
        keys = [
            text[4 * start : 4 * (start + length)]
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        ]
        return np.array(sorted(range(len(keys)), key=keys.__getitem__))

    def common(self, order: np.ndarray) -> np.ndarray:
        """How many tokens that are run each request begins with like the one before; 0 for the first."""
        found = np.zeros(len(order), np.int64)
        for first in range(1, len(order), AT_ONCE):
            later = order[first : first + AT_ONCE]
            earlier = order[first - 1 : first - 1 + len(later)]
            most = np.minimum(self.lengths[earlier], self.lengths[later])
            one, other = (pieces(self.flat, self.starts[some], most) for some in (earlier, later))
            pair = np.repeat(np.arange(len(later)), most)
            differ = np.flatnonzero(one != other)
            differing, at = np.unique(pair[differ], return_index=True)
            most[differing] = differ[at] - (most.cumsum() - most)[differing]
            found[first : first + len(later)] = most
        return found

    def brought(self, order: np.ndarray) -> np.ndarray:
        """How many tokens of each request, by its number, its document has brought before.

        Args:
            order: of the requests by their tokens: in it no earlier request of the document has more in
                common than the one before.
        """
        by_owner = order[np.argsort(self.owners[order], kind="stable")]
        common = self.common(by_owner)
        owners = self.owners[by_owner]
        common[1:][owners[1:] != owners[:-1]] = 0
        found = np.zeros(len(order), np.int64)
        found[by_owner] = common
        return found


def pieces(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Slices of an array, one behind the other."""
    found: np.ndarray = values[counting(starts, counts)]
    return found


def counting(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers from each start on, so many of each."""
    before = counts.cumsum() - counts
    found: np.ndarray = np.repeat(starts - before, counts) + np.arange(counts.sum())
    return found
