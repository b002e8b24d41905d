"""Area under the ROC curve: by hand, pair by pair, as SciPy has it, and its bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from sparsity_atlas.statistics.auroc import auroc, resampled_aurocs, units_of_each
from sparsity_atlas.statistics.bootstrap import resampled_weights


def pairwise(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Every pair of a right and a wrong sample, as often as both count."""
    won = pairs = 0.0
    for i in np.flatnonzero(right):
        for j in np.flatnonzero(~right):
            often = weights[i] * weights[j]
            won += often * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
            pairs += often
    return won / pairs


def some(samples: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Three predictors with ties, and outcomes."""
    rng = np.random.default_rng(0)
    right = rng.random(samples) < 0.6
    return rng.integers(0, 9, (3, samples)) + right * [[0.0], [1.5], [9.0]], right


def test_by_hand() -> None:
    """Of right 3, 1 and wrong 2, 1: three pairs are 1, 1, 0, and the tie of 1 and 1 is a half."""
    scores = np.array([[3.0, 1, 2, 1]])
    right = np.array([True, True, False, False])
    assert auroc(scores, right, np.ones((1, 4))).tolist() == [[2.5 / 4]]
    # The second sample three times, the third not at all: 1 + 3 · 1/2 of 4 pairs.
    assert auroc(scores, right, np.array([[1.0, 3, 0, 1]])).tolist() == [[2.5 / 4]]
    assert np.isnan(auroc(scores, right, np.array([[1.0, 1, 0, 0]]))).all()


def test_pair_by_pair_and_as_scipy_has_it() -> None:
    scores, right = some()
    weights = np.random.default_rng(1).integers(0, 3, (5, 40)).astype(float)
    found = auroc(scores, right, np.vstack([np.ones(40), weights]))
    for row, own in zip(found, [np.ones(40), *weights], strict=True):
        assert row == pytest.approx([pairwise(one, right, own) for one in scores])
    for value, own in zip(found[0], scores, strict=True):
        pairs = right.sum() * (~right).sum()
        assert value == pytest.approx(mannwhitneyu(own[right], own[~right]).statistic / pairs)
    assert found[0, 2] == 1.0


@pytest.mark.parametrize("clustered", [False, True])
def test_every_drawing(clustered: bool) -> None:
    scores, right = some()
    cluster = np.arange(40) // 2 if clustered else None
    found = resampled_aurocs(scores, right, cluster, 30, (7, "task"))
    assert found.shape == (31, 3)
    drawn = np.concatenate(list(resampled_weights(20 if clustered else 40, 30, (7, "task"))))
    for row, weights in zip(found[1:], drawn, strict=True):
        own = np.repeat(weights, 2) if clustered else weights
        assert row == pytest.approx([pairwise(one, right, own) for one in scores])


def test_among_some_of_them() -> None:
    scores, right = some()
    half = np.arange(40) < 20
    found = resampled_aurocs(scores, right, None, 20, (7, "task"), among=half)
    assert found[0] == pytest.approx(auroc(scores[:, half], right[half], np.ones((1, 20)))[0])
    assert np.isfinite(found).all()


def test_a_drawing_of_one_outcome_tells_nothing() -> None:
    right = np.arange(12) == 0
    found = resampled_aurocs(np.arange(12.0)[None], right, None, 200, (0, "task"))
    assert (found == 0).all()


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Two normal distributions one standard deviation apart: their area is Φ(1/√2) = .7602."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        right = rng.random(80) < 0.5
        found = resampled_aurocs(
            (rng.standard_normal(80) + right)[None], right, None, 300, (0, "t")
        )
        low, high = np.quantile(found[1:, 0], (0.025, 0.975))
        held += low <= 0.7602 <= high
    assert 89 <= held <= 99


def test_units_of_each_outcome() -> None:
    right = np.array([True, True, False, False, True])
    assert units_of_each(right, None) == (3, 2)
    assert units_of_each(right, np.array([0, 0, 0, 1, 2])) == (2, 2)
