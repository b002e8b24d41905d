"""Monotone cubic interpolation (PCHIP) of many curves at once, each with points of its own."""

from __future__ import annotations

import numpy as np


def monotone_cubic(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What `scipy.interpolate.PchipInterpolator` gives of each row, which takes one row of x only.

    Slopes at inner points are weighted harmonic means of the neighbouring secants (Fritsch and Butland,
    SIAM J. Sci. Comput. 5(2), 1984), those at the ends Moler's three-point ones (Numerical Computing with
    Matlab, 2004).

    Args:
        x: [R, P], P at least 2, rising strictly along each row.
        y: [R, P], finite.
        at: [R, Q], within the ends of their row.

    Returns:
        [R, Q].
    """
    step = np.diff(x, axis=1)
    secant = np.diff(y, axis=1) / step
    slope = _slopes(step, secant)
    # The last point before a place, or the place itself; the end belongs to the last piece.
    left = (at[:, :, None] >= x[:, None, 1:-1]).sum(axis=2)
    begin, end, width, rise = (
        np.take_along_axis(each, left, axis=1)
        for each in (slope[:, :-1], slope[:, 1:], step, secant)
    )
    bend = (begin + end - 2 * rise) / width
    past = at - np.take_along_axis(x, left, axis=1)
    # Powers one after the other, which rounds as scipy does.
    square = past * past
    found: np.ndarray = (
        np.take_along_axis(y, left, axis=1)
        + begin * past
        + ((rise - begin) / width - bend) * square
        + bend / width * (square * past)
    )
    return found


def _slopes(step: np.ndarray, secant: np.ndarray) -> np.ndarray:
    """[R, P] of steps and secants [R, P - 1]."""
    if step.shape[1] == 1:
        return np.repeat(secant, 2, axis=1)
    before, after = secant[:, :-1], secant[:, 1:]
    turns = np.sign(before) * np.sign(after) <= 0
    first, second = 2 * step[:, 1:] + step[:, :-1], step[:, 1:] + 2 * step[:, :-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (first / before + second / after) / (first + second)
        inner = np.where(turns, 0.0, 1.0 / mean)
    ends = [
        _end_slope(step[:, near], step[:, far], secant[:, near], secant[:, far])[:, None]
        for near, far in ((0, 1), (-1, -2))
    ]
    return np.hstack([ends[0], inner, ends[1]])


def _end_slope(
    near: np.ndarray, far: np.ndarray, secant: np.ndarray, beyond: np.ndarray
) -> np.ndarray:
    """Of a parabola through three points, unless that would leave the end secant's direction or overshoot."""
    slope = ((2 * near + far) * secant - near * beyond) / (near + far)
    steep = (np.sign(secant) != np.sign(beyond)) & (np.abs(slope) > 3 * np.abs(secant))
    held = np.where(steep, 3 * secant, slope)
    kept: np.ndarray = np.where(np.sign(slope) == np.sign(secant), held, 0.0)
    return kept
