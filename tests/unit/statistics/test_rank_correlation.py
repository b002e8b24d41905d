"""Rank correlations against scipy's, and their intervals against drawings written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from sparsity_atlas.statistics.rank_correlation import intervals, spearman


def test_by_hand() -> None:
    target = np.array([1.0, 2, 3, 4])
    values = np.array([[10, 4, 1, 7], [20, 3, 1, 7], [30, 2, 0, 7], [25, 1, 0, 7.0]])
    # One exchange of neighbours: 1 - 6 · 2 / (4 · 15). Two ties: √(4/5).
    found = spearman(values, target)
    assert found[:3] == pytest.approx([0.8, -1, -(0.8**0.5)])
    assert np.isnan(found[3])


def test_as_scipy_has_it_with_ties() -> None:
    rng = np.random.default_rng(0)
    values, target = rng.integers(0, 6, (40, 3)), rng.integers(0, 8, 40)
    expected = [spearmanr(column, target).statistic for column in values.T]
    assert spearman(values, target) == pytest.approx(expected)


def test_clusters_are_drawn_whole() -> None:
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(6), [1, 2, 3, 1, 2, 4])
    values, target = rng.random((13, 1)), rng.random(13)
    drawings = np.random.default_rng(5)
    found = []
    for _ in range(60):
        drawn = drawings.integers(6, size=6)
        points = np.concatenate([np.flatnonzero(cluster == one) for one in drawn])
        found.append(spearmanr(values[points, 0], target[points]).statistic)
    low, high = intervals(values, target, cluster, 60, seed=5)
    assert (low[0], high[0]) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])))


def test_a_constant_has_neither_value_nor_interval() -> None:
    values, target = np.ones((8, 1)), np.arange(8.0)
    low, high = intervals(values, target, np.arange(8), 50)
    assert np.isnan([*low, *high]).all()
