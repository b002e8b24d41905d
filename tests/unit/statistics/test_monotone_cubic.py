"""Interpolation of many curves against scipy's, which takes one at a time."""

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from sparsity_atlas.statistics.monotone_cubic import monotone_cubic


@pytest.mark.parametrize("points", range(2, 10))
def test_each_row_is_what_scipy_gives(points: int) -> None:
    rng = np.random.default_rng(points)
    x = np.sort(rng.random((60, points)), axis=1)
    y = -np.sort(rng.random((60, points)) ** 3, axis=1)
    y[::3] = rng.normal(size=y[::3].shape)  # turns, and ends that overshoot
    y[1::3] = np.round(y[1::3], 1)  # flat pieces
    at = x[:, :1] + (x[:, -1:] - x[:, :1]) * rng.random((60, 12))
    at[:, :3] = x[:, [0, -1, points // 2]]
    wanted = [PchipInterpolator(*row)(places) for *row, places in zip(x, y, at, strict=True)]
    assert monotone_cubic(x, y, at) == pytest.approx(np.array(wanted), rel=1e-13, abs=1e-15)
