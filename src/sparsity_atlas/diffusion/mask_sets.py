"""Which tokens of an answer are masked at a time, so that its likelihood's bound is a weighted sum over them.

A model that fills masked tokens in gives an answer of L tokens in any order of them. With the mean over all
orders, and Jensen's inequality, −log p(answer) is at most

    Σ over l = 1..L of the mean over sets S of l tokens of  (1 / l) Σ over i in S of −log p(i | all not in S),

which is the expectation, with l uniform on 1..L and S a uniformly random set of l tokens, of (L / l) Σ −log p
(arXiv 2502.09992; that it is a mean over orders: arXiv 2406.03736). So a set's weight is 1 / (l · C(L, l)).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class MaskSets:
    """Sets of masked tokens of an answer.

    Attributes:
        masked: bool [sets, length].
        weights: float64 [sets]: the bound is Σ weight · Σ of the masked tokens' −log p.
        exact: whether these are all sets, so that the bound is no estimate.
    """

    masked: np.ndarray
    weights: np.ndarray
    exact: bool


# Options of a document that are equally long have the same ones, and are asked for one after the other.
@lru_cache(maxsize=64)
def mask_sets(length: int, samples: int, seed: str) -> MaskSets:
    """The sets of an answer: all 2^L − 1 where these are no more than `samples`, else a sample of them.

    The estimate that a sample gives is unbiased. Each number of masked tokens has its share of the sample:
    numbers with few sets first and with all of these; the others' sets are drawn. In an answer of more
    tokens than `samples`, numbers are drawn, too: evenly spaced with one random offset, so that each
    comes up `samples` / L times in the mean, and no rounding favours any.

    Args:
        length: tokens of the answer, L.
        samples: sets at most.
        seed: hexadecimal; the same sets come of the same seed.
    """
    generator = np.random.Generator(np.random.PCG64(int(seed, 16)))
    if length > samples:
        places = (np.arange(samples) + generator.random()) / samples
        # Rounding could bring the last place up to the end.
        sizes = np.minimum(np.floor(places * length).astype(int) + 1, length)
        return MaskSets(_drawn(generator, length, sizes), length / (samples * sizes), exact=False)
    shared = _shared(length, samples)
    masked = shared.masked
    if not shared.exact:
        masked = masked.copy()
        masked[shared.drawn] = _drawn(generator, length, shared.sizes)
    return MaskSets(masked, shared.weights, shared.exact)


@dataclass(frozen=True)
class _Shared:
    """What all answers of a length have in common.

    Attributes:
        masked: bool [sets, length], of numbers of masked tokens of which all sets are there.
        drawn: bool [sets], which of them are drawn.
        sizes: int64, masked tokens of each that is drawn.
        weights: see `MaskSets`.
        exact: likewise.
    """

    masked: np.ndarray
    drawn: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray
    exact: bool


@lru_cache(maxsize=64)
def _shared(length: int, samples: int) -> _Shared:
    shares = sorted(_shares(length, samples).items())
    sizes = np.repeat(*np.transpose(shares))
    masked = np.zeros((len(sizes), length), dtype=bool)
    drawn = np.ones(len(sizes), dtype=bool)
    for size, count in shares:
        if count == math.comb(length, size):
            masked[sizes == size] = _all(length, size)
            drawn[sizes == size] = False
    weights = np.concatenate([np.full(count, 1 / (size * count)) for size, count in shares])
    for one in (masked, weights):
        one.setflags(write=False)
    return _Shared(masked, drawn, sizes[drawn], weights, not drawn.any())


def _shares(length: int, samples: int) -> dict[int, int]:
    """How many sets there are of each number of masked tokens, one at least."""
    shares, left = {}, samples
    by_count = sorted(range(1, length + 1), key=lambda size: math.comb(length, size))
    for waiting, size in zip(range(length, 0, -1), by_count, strict=True):
        shares[size] = min(math.comb(length, size), left // waiting)
        left -= shares[size]
    return shares


def _all(length: int, size: int) -> np.ndarray:
    chosen = np.array(list(itertools.combinations(range(length), size)))
    masked = np.zeros((len(chosen), length), dtype=bool)
    np.put_along_axis(masked, chosen, True, axis=1)
    return masked


def _drawn(generator: np.random.Generator, length: int, sizes: np.ndarray) -> np.ndarray:
    """A uniformly random set of each size, bool [sizes, length]; with repetition."""
    order = np.argsort(generator.random((len(sizes), length)), axis=1, kind="stable")
    masked = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(masked, order, np.arange(length) < sizes[:, None], axis=1)
    return masked
