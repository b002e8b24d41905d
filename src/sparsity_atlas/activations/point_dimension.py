"""Local intrinsic dimension of each point among others; `dimension` has that of a whole set."""

from __future__ import annotations

import numpy as np

from sparsity_atlas.activations.dimension import RESAMPLES, distances_between

# An inverse estimate is at least this: where all neighbours are at one distance there is no dimension.
_LEAST = 1e-12


def fewest_points(k: int) -> int:
    """Different points without which a resampled set may lack neighbours: it has 63 % of them."""
    return 4 * k + 2


def point_dimensions(points: np.ndarray, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Estimates of the dimension around each point.

    By maximum likelihood from the distances r_1 ≤ … ≤ r_k of its neighbours,
    1 / (1/(k − 1) · Σ_{j < k} log(r_k / r_j)) (Levina & Bickel 2004), and by GeoMLE (Gomtsyan et al. 2019):
    that estimate in resampled sets with k/2 to 2k neighbours over the distance of the last one, a straight
    line through which gives the value at no distance, above zero or not. Copies of a point are no neighbours
    of it, and have its estimates.

    Args:
        points: float64 [points, channel]; 8 · points² bytes for their distances.
        k: neighbours, 4 at least.
        seed: of the resampling.

    Returns:
        Both, float64 [points]: by maximum likelihood, by GeoMLE.

    Raises:
        ValueError: fewer than `fewest_points` are different.
    """
    own, copy = np.unique(points, axis=0, return_inverse=True)
    if len(own) < fewest_points(k):
        raise ValueError(f"{len(own)} different points, {fewest_points(k)} are needed")
    distances = distances_between(own)
    np.fill_diagonal(distances, np.inf)  # no point is its own neighbour
    _, likely = _estimates(_nearest(distances, k))
    return likely[:, -1][copy.ravel()], _extrapolated(distances, k, seed)[copy.ravel()]


def _nearest(distances: np.ndarray, k: int) -> np.ndarray:
    """The k smallest of each row, ascending."""
    return np.sort(np.partition(distances, k - 1, axis=1)[:, :k], axis=1)


def _estimates(near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances of the last neighbour and estimates from 2, 3, ... neighbours: [points, k - 1] each."""
    logs = np.log(near)
    before = np.cumsum(logs, axis=1)[:, :-1]
    others = np.arange(1, near.shape[1])
    inverse = logs[:, 1:] - before / others
    return near[:, 1:], 1 / np.maximum(inverse, _LEAST)


def _extrapolated(distances: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Of each point a straight line's value at no distance, by least squares over sets and neighbours."""
    rng = np.random.default_rng(seed)
    few, many, count = k // 2, 2 * k, len(distances)
    sums = np.zeros((5, count))
    for _ in range(RESAMPLES):
        kept = _resampled(rng, count, many)
        radius, found = _estimates(_nearest(distances[:, kept], many))
        x, y = radius[:, few - 2 :], found[:, few - 2 :]
        sums += np.stack(
            [np.full(count, x.shape[1]), *(one.sum(1) for one in (x, y, x * x, x * y))]
        )
    n, x, y, xx, xy = sums
    spread = n * xx - x * x
    slope = np.divide(n * xy - x * y, spread, out=np.zeros(count), where=spread > 0)
    value: np.ndarray = (y - slope * x) / n
    return value


def _resampled(rng: np.random.Generator, count: int, neighbours: int) -> np.ndarray:
    """Points drawn with replacement, each once, or copies would be neighbours at no distance."""
    while True:
        kept = np.unique(rng.integers(count, size=count))
        if len(kept) > neighbours:
            return kept
