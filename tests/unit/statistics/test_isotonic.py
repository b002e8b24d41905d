"""The vectorised non-increasing fit against scipy's, and where it crosses a bar."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from sparsity_atlas.statistics.isotonic import first_crossing, nonincreasing_fit, pool_ties

numbers = st.floats(-10, 10, allow_nan=False).map(lambda number: round(number, 3))


@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.tuples(*[numbers] * n), min_size=1)))
def test_fit_is_that_of_scipy_in_every_row(rows):
    y = np.array(rows, dtype=float)
    expected = [isotonic_regression(row, increasing=False).x for row in y]
    np.testing.assert_allclose(nonincreasing_fit(y), expected, atol=1e-9)


@given(st.lists(st.tuples(st.integers(0, 4), numbers), min_size=1, max_size=12))
def test_pooled_ties_are_weighted_points(points):
    points = sorted(points, key=lambda point: point[0])
    x, y = np.array(points, dtype=float).T
    places, sizes = np.unique(x, return_counts=True)
    means = [y[x == place].mean() for place in places]
    expected = np.repeat(isotonic_regression(means, weights=sizes, increasing=False).x, sizes)
    fit = nonincreasing_fit(pool_ties(x[None], y[None]))[0]
    np.testing.assert_allclose(fit, expected, atol=1e-9)


def test_equal_numbers_stay_what_they_are():
    """A difference of two curves that lose nothing is nothing, and not what their sums are rounded to."""
    y = np.full((2, 10), 0.1)
    assert (np.cumsum(y, axis=1) / np.arange(1, 11) != y).any()
    assert np.array_equal(nonincreasing_fit(y), y)
    assert np.array_equal(pool_ties(np.zeros((2, 10)), y), y)


def test_ties_do_not_reach_over_to_the_next_row():
    x = np.array([[0.1, 0.5], [0.5, 0.9]])
    y = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert pool_ties(x, y).tolist() == y.tolist()


def test_a_failed_point_pulls_down_all_that_follow_and_none_before():
    fit = nonincreasing_fit(np.array([[1.0, 0.9, -np.inf, 1.0, 0.5]]))
    assert fit.tolist() == [[1.0, 0.9, -np.inf, -np.inf, -np.inf]]


def test_crossing_of_each_row():
    x = np.array([[0.0, 0.2, 0.6]] * 4)
    y = np.array([[1, 0.9, 0.7], [1, 1, 1], [1, 0.4, 0.2], [1, 0.9, -np.inf]])
    position, index = first_crossing(x, y, 0.8)
    np.testing.assert_allclose(position, [0.4, np.nan, 0.2 / 3, 0.2])
    assert index.tolist() == [2, 3, 1, 2]


def test_rounding_below_the_bar_is_no_crossing():
    y = np.array([[1.0, np.nextafter(0.99, 0)], [1.0, 0.99 - 1e-9]])
    _, index = first_crossing(np.array([[0.0, 0.5]] * 2), y, 0.99)
    assert index.tolist() == [2, 1]
