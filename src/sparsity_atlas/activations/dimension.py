"""Local intrinsic dimension: how many directions points have around them, by their neighbours' distances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparsity_atlas.activations.store import Rows

# Neighbours of the estimate by maximum likelihood, and between which GeoMLE extrapolates.
NEIGHBOURS = 20
FEW, MANY = 10, 40
RESAMPLES = 20


class Dimension(NamedTuple):
    """Two estimates of one set of points.

    mle: by maximum likelihood from NEIGHBOURS neighbours (Levina & Bickel 2004), inverses averaged over the
        points (MacKay & Ghahramani 2005).
    geomle: extrapolated to no distance (Gomtsyan et al. 2019); None where that leaves nothing, as may be
        where MANY neighbours are a large share of the points.
    points: that are not the same as another.
    """

    mle: float | None
    geomle: float | None
    points: int


def sample(values: np.ndarray | Rows, most: int) -> np.ndarray:
    """At most so many rows, evenly spread over all: float64 [rows, channel], read chunk by chunk."""
    tokens = values.shape[0]
    wanted = np.unique(np.linspace(0, tokens - 1, min(most, tokens)).round().astype(int))
    step = values.chunk if isinstance(values, Rows) else tokens
    found = []
    for first in range(0, tokens, step):
        own = wanted[(wanted >= first) & (wanted < first + step)]
        if len(own):
            found.append(values[first : min(first + step, tokens)][own - first])
    return np.concatenate(found).astype(np.float64)


def dimension(points: np.ndarray, seed: int = 0) -> Dimension:
    """Estimates for some points; None where there are no more than MANY different ones.

    Args:
        points: float64 [points, channel]; 8 · points² bytes for their distances.
        seed: of the resampling.
    """
    points = np.unique(points, axis=0)
    if len(points) <= MANY + 1:
        return Dimension(None, None, len(points))
    distances = distances_between(points)
    near = np.sort(distances, axis=1)[:, 1 : MANY + 1]
    return Dimension(_mle(near, NEIGHBOURS), _geomle(distances, seed), len(points))


def distances_between(points: np.ndarray) -> np.ndarray:
    """Euclidean distances of different points [points, points]; zero on the diagonal alone."""
    centred = points - points.mean(0)
    squares = (centred**2).sum(1)
    found = squares[:, None] + squares - 2 * centred @ centred.T
    np.fill_diagonal(found, 0)
    # Of near-duplicates nothing but rounding is left; a distance of zero has no logarithm.
    smallest = np.finfo(np.float64).eps * squares.max()
    off = ~np.eye(len(points), dtype=bool)
    found[off] = np.maximum(found[off], smallest)
    distances: np.ndarray = np.sqrt(found)
    return distances


def _mle(near: np.ndarray, k: int) -> float | None:
    """Levina & Bickel's estimate from the k nearest distances [points, k or more], ascending."""
    inverse = np.log(near[:, k - 1 : k] / near[:, : k - 1]).sum(1) / (k - 1)
    mean = float(inverse.mean())
    return 1 / mean if mean > 0 else None


def _geomle(distances: np.ndarray, seed: int) -> float | None:
    """Estimates at FEW to MANY neighbours in resampled sets over the mean distance: a line's value at zero.

    Args:
        distances: [points, points].
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    count = len(distances)
    radii, found = [], []
    for _ in range(RESAMPLES):
        # Each point once, or copies would be neighbours at no distance.
        kept = np.unique(rng.integers(count, size=count))
        if len(kept) <= MANY + 1:
            return None
        near = np.sort(distances[np.ix_(kept, kept)], axis=1)[:, 1 : MANY + 1]
        for k in range(FEW, MANY + 1):
            estimate = _mle(near, k)
            if estimate is None:
                return None
            radii.append(float(near[:, k - 1].mean()))
            found.append(estimate)
    radius = np.array(radii) / max(radii)
    design = np.stack([np.ones_like(radius), radius], 1)
    solution = np.linalg.lstsq(design, np.array(found), rcond=None)[0]
    return float(solution[0]) if solution[0] > 0 else None
