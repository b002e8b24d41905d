"""How the share of active entries changes with training: Sparsing Law's two laws, fitted by least squares.

Over D, the training tokens in billions (arXiv 2411.02335), the activation ratio A = 1 - sparsity follows

    logspace    A = exp(-c D^α + b) + A0     where the activation is ReLU: it falls to its limit A0
    power       A = A0 - c D^(-α)            where it is SiLU: it rises to A0

Both are a constant and a shape of D: A = A0 + k f(D), with one number in the shape of the second law and two
in that of the first. Whatever the shape, A0 in [0, 1] and k, of the law's sign, follow from linear least
squares. So only the shape is searched for (variable projection; Golub and Pereyra, SIAM J. Numer. Anal. 10,
1973): on a grid, and then on ever finer ones around its best place. That needs no start, finds the same as
Levenberg-Marquardt from a good one, and runs on all bootstrap replicates at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

LOGSPACE, POWER = "logspace", "power"
BILLION = 1e9
# The shapes' numbers: α, and c D^α at the largest D. The published ones lie well within.
ALPHA = (0.02, 5.0)
REACH = (0.01, 50.0)
# Places of the first grid in each number, and of the finer ones; how often it is made finer, and by what.
COARSE, FINE, TIMES, FINER = 40, 5, 18, 0.5
# Replicates at a time: some 10 MB an array.
_BLOCK = 500
# As near the end of a range, as a share of its logarithm, a number is at that end.
_AT_END = 1e-3


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: of the law.
        parameters: how many it has.
        ranges: of the numbers of its shape.
        sign: of k: 1 where the ratio falls with D, -1 where it rises.
        shape: from the numbers [..., m] and D over its largest [n] to f [..., n].
    """

    name: str
    parameters: int
    ranges: tuple[tuple[float, float], ...]
    sign: int
    shape: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _logspace(numbers: np.ndarray, z: np.ndarray) -> np.ndarray:
    alpha, reach = numbers[..., 0, None], numbers[..., 1, None]
    found: np.ndarray = np.exp(-reach * z**alpha)
    return found


def _power(numbers: np.ndarray, z: np.ndarray) -> np.ndarray:
    found: np.ndarray = z ** -numbers[..., 0, None]
    return found


LAWS = {
    LOGSPACE: Law(LOGSPACE, 4, (ALPHA, REACH), 1, _logspace),
    POWER: Law(POWER, 3, (ALPHA,), -1, _power),
}


@dataclass(frozen=True)
class Fits:
    """A law fitted to each row of ratios.

    Attributes:
        law: which.
        largest: D, in billions, that shapes are relative to.
        numbers: [B, m] of its shape.
        limit: [B], A0.
        factor: [B], k.
        squares: [B], sum of squared residuals.
    """

    law: Law
    largest: float
    numbers: np.ndarray
    limit: np.ndarray
    factor: np.ndarray
    squares: np.ndarray

    @property
    def alpha(self) -> np.ndarray:
        """[B]: α."""
        found: np.ndarray = self.numbers[:, 0]
        return found

    @property
    def c(self) -> np.ndarray:
        """[B]: c, for D in billions."""
        if self.law.name == POWER:
            return -self.factor * self.largest**self.alpha
        found: np.ndarray = self.numbers[:, 1] / self.largest**self.alpha
        return found

    @property
    def b(self) -> np.ndarray | None:
        """[B]: b; -inf where nothing falls; None of the law that has none."""
        if self.law.name == POWER:
            return None
        with np.errstate(divide="ignore"):
            found: np.ndarray = np.log(self.factor)
        return found

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """[B, n]: ratios at some numbers of tokens [n]."""
        z = np.asarray(tokens, dtype=np.float64) / BILLION / self.largest
        found: np.ndarray = self.limit[:, None] + self.factor[:, None] * self.law.shape(
            self.numbers, z
        )
        return found

    def edge(self) -> str:
        """Why the first row's fit is none: it ends where the law does; empty where it does not."""
        if self.factor[0] == 0:
            return f"the ratio does not {'fall' if self.law.sign > 0 else 'rise'} with training"
        for number, (low, high) in zip(self.numbers[0], self.law.ranges, strict=True):
            place = np.log(number / low) / np.log(high / low)
            if not _AT_END < place < 1 - _AT_END:
                return "no limit can be told: the fit runs to an end of what the law allows"
        if not 0 < self.limit[0] < 1:
            return "no limit can be told: the fit runs to a ratio of 0 or 1"
        return ""


def fit(law: Law, tokens: np.ndarray, ratios: np.ndarray) -> Fits:
    """Fit a law to rows of activation ratios, all points of equal weight.

    Args:
        law: one of `LAWS`.
        tokens: [n], that the points were trained on; above 0, and not all the same.
        ratios: [B, n].

    Raises:
        ValueError: there are fewer points than parameters, or they do not fit together.
    """
    tokens, ratios = np.asarray(tokens, dtype=np.float64), np.atleast_2d(ratios)
    if len(tokens) < law.parameters:
        raise ValueError(f"{len(tokens)} points, the law has {law.parameters} parameters")
    if ratios.shape[1] != len(tokens) or not (tokens > 0).all() or len(np.unique(tokens)) < 2:
        raise ValueError(f"{ratios.shape} ratios at {tokens} tokens")
    z = tokens / tokens.max()
    blocks = [
        _search(law, z, ratios[start : start + _BLOCK]) for start in range(0, len(ratios), _BLOCK)
    ]
    numbers, limit, factor, squares = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return Fits(law, float(tokens.max()) / BILLION, numbers, limit, factor, squares)


def _search(
    law: Law, z: np.ndarray, ratios: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Numbers [B, m], A0, k and squares [B] of the best fit to each row."""
    low, high = np.log(np.array(law.ranges)).T
    axes = [np.linspace(*ends, COARSE) for ends in zip(low, high, strict=True)]
    grid = np.array(list(product(*axes)))
    shapes = law.shape(np.exp(grid), z)
    # All rows have the same shapes here, so that sums of products do; and none is small beside another.
    limit, k = _linear(law, shapes.mean(-1), (shapes**2).sum(-1), ratios @ shapes.T, ratios)
    squares = (
        (ratios**2).sum(-1, keepdims=True)
        + len(z) * limit**2
        + k**2 * (shapes**2).sum(-1)
        - 2 * limit * ratios.sum(-1, keepdims=True)
        - 2 * k * (ratios @ shapes.T)
        + 2 * limit * k * shapes.sum(-1)
    )
    logs = grid[squares.argmin(-1)]
    step = np.array([axis[1] - axis[0] for axis in axes])
    offsets = np.array(list(product(np.linspace(-1, 1, FINE), repeat=len(axes))))
    row = np.arange(len(ratios))
    for _ in range(TIMES):
        around = np.clip(logs[:, None] + offsets * step, low, high)
        shapes = law.shape(np.exp(around), z)
        products = np.einsum("btn,bn->bt", shapes, ratios)
        limit, k = _linear(law, shapes.mean(-1), (shapes**2).sum(-1), products, ratios)
        squares = ((ratios[:, None] - limit[..., None] - k[..., None] * shapes) ** 2).sum(-1)
        place = squares.argmin(-1)
        logs = around[row, place]
        step = step * FINER
    return np.exp(logs), limit[row, place], k[row, place], squares[row, place]


def _linear(
    law: Law, mean: np.ndarray, size: np.ndarray, products: np.ndarray, ratios: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A0 and k [B, T] of the best fits with given shapes f.

    Args:
        law: which.
        mean: of f, [T] or [B, T].
        size: sum of f², likewise.
        products: sum of f A, [B, T].
        ratios: A, [B, n].
    """
    count, total = ratios.shape[1], ratios.sum(-1, keepdims=True)
    spread = np.broadcast_to(size - count * mean**2, products.shape)
    # A shape that is the same everywhere tells nothing of k.
    told = spread > 1e-14 * size
    k = np.divide(products - mean * total, spread, out=np.zeros_like(products), where=told)
    k = np.where(law.sign * k > 0, k, 0.0)
    free = total / count - k * mean
    limit = np.clip(free, 0.0, 1.0)
    # Where the limit was held, k is the best for it.
    again = (products - limit * count * mean) / np.maximum(size, 1e-300)
    again = np.where(law.sign * again > 0, again, 0.0)
    return limit, np.where((k != 0) & (limit != free), again, k)
