"""Non-increasing least-squares fits of many curves at once, and where they cross a bar."""

from __future__ import annotations

import numpy as np

# Far below any difference that a sample can make, far above the rounding of a mean: a score that
# equals the bar on paper (99 of 100 at a bar of 0.99) must not fall below it by rounding.
TOLERANCE = 1e-12


def pool_ties(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Replace y at equal x by its mean over them.

    x, y: [R, L], R curves of L points, x ascending along each row. Returns [R, L].
    """
    rows, width = x.shape
    if width == 0:
        return y.copy()
    starts = np.ones((rows, width), dtype=bool)
    starts[:, 1:] = x[:, 1:] != x[:, :-1]
    group = np.cumsum(starts.ravel()) - 1
    means = np.bincount(group, weights=y.ravel()) / np.bincount(group)
    # A mean of equal numbers is that number, whatever their sum is rounded to.
    first = np.flatnonzero(starts.ravel())
    means = np.clip(
        means, np.minimum.reduceat(y.ravel(), first), np.maximum.reduceat(y.ravel(), first)
    )
    fitted: np.ndarray = means[group].reshape(rows, width)
    return fitted


def nonincreasing_fit(y: np.ndarray) -> np.ndarray:
    """Least-squares non-increasing fit of each row, all points of equal weight.

    The result is that of pool-adjacent-violators; it is computed by the min-max formula
    fit_i = min over a <= i of max over b >= i of mean(y_a..y_b) (Robertson, Wright and Dykstra,
    Order Restricted Statistical Inference, 1988, section 1.4), which needs no data-dependent
    loop and so runs on all rows at once. Neighbours of equal y get equal fits, so ties in x need
    only be pooled beforehand. -inf is allowed and is passed on to every later point.

    y: [R, L]. Returns [R, L]. Goes over pairs of points, all rows of one at a time, in O(R L) memory.
    """
    points = np.ascontiguousarray(y.T)
    width = len(points)
    fit, means = np.full(points.shape, np.inf), np.empty(points.shape)
    for a in range(width):
        total, low, high = points[a].copy(), points[a].copy(), points[a].copy()
        means[a] = points[a]
        for b in range(a + 1, width):
            total += points[b]
            np.minimum(low, points[b], out=low)
            np.maximum(high, points[b], out=high)
            # As in `pool_ties`.
            np.clip(total / (b - a + 1), low, high, out=means[b])
        best_end = means[-1]
        for b in reversed(range(a, width)):
            best_end = np.maximum(means[b], best_end)
            np.minimum(fit[b], best_end, out=fit[b])
    return fit.T


def first_crossing(x: np.ndarray, y: np.ndarray, bar: float) -> tuple[np.ndarray, np.ndarray]:
    """Where each curve first falls below the bar, by linear interpolation.

    x, y: [R, L + 1], x ascending, y[:, 0] >= bar. y may be -inf: the crossing is then at the
    last point before it.
    Returns (position [R], NaN where the curve never falls below; index [R] of the first point
    below the bar, L + 1 where there is none).
    """
    below = y < bar - TOLERANCE
    never = ~below.any(axis=1)
    index = np.where(never, y.shape[1], below.argmax(axis=1))
    right = np.where(never, y.shape[1] - 1, index)
    left = np.maximum(right - 1, 0)
    row = np.arange(len(x))
    drop = y[row, left] - y[row, right]
    above = np.maximum(y[row, left] - bar, 0.0)
    share = np.divide(above, drop, out=np.zeros_like(drop), where=~never & (drop > 0))
    position = x[row, left] + share * (x[row, right] - x[row, left])
    return np.where(never, np.nan, position), index
