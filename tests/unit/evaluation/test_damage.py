"""How well the samples know a level's damage, against a bootstrap and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsity_atlas.evaluation.damage import ALLOWED_LOSS, Values, damage_error, score_error


def drawn(units: int, each: int, seed: int = 0) -> tuple[Values, Values]:
    """Texts of some hundred tokens in clusters, whose losses grow together."""
    draw = np.random.default_rng(seed)
    dense, own = [], []
    for unit in range(units):
        common = draw.normal(0.02, 0.02)
        for _ in range(each):
            tokens = int(draw.integers(50, 400))
            nats = tokens * draw.normal(3, 0.3)
            dense.append((unit, nats, tokens))
            own.append((unit, nats + tokens * (common + draw.normal(0, 0.005)), tokens))
    return dense, own


@pytest.mark.parametrize(("units", "each"), [(60, 1), (40, 3)])
def test_it_is_that_of_a_paired_bootstrap_over_units(units: int, each: int) -> None:
    dense, own = drawn(units, each)
    draw = np.random.default_rng(1)
    of = [[i for i, one in enumerate(own) if one[0] == unit] for unit in range(units)]
    found = []
    for _ in range(3000):
        rows = [i for unit in draw.integers(0, units, units) for i in of[unit]]
        found.append(sum(own[i][1] - dense[i][1] for i in rows) / sum(own[i][2] for i in rows))
    assert score_error(dense, own) == pytest.approx(np.std(found), rel=0.06)


def test_accuracies_by_hand() -> None:
    right = [1, 1, 1, 0]
    dense: Values = [(i, right[i], 1) for i in range(4)]
    own: Values = [(i, right[i] - (i == 0), 1) for i in range(4)]
    # Differences -1, 0, 0, 0: their standard deviation over the root of their number.
    one = math.sqrt(0.75 / 3 / 4)
    assert score_error(dense, own) == pytest.approx(one)
    metrics = {name: ("accuracy", "acc,none") for name in ("a", "b")}
    both = damage_error(metrics, {"a": dense, "b": dense}, {"a": own, "b": own})
    assert both == pytest.approx(math.sqrt(2) * one / (1.5 * 0.01))


def test_a_loss_is_told_in_what_the_bar_allows() -> None:
    dense, own = drawn(20, 1)
    found = damage_error({"pages": ("loss", None)}, {"pages": dense}, {"pages": own})
    assert found == pytest.approx(score_error(dense, own) / ALLOWED_LOSS)


def test_one_unit_tells_nothing() -> None:
    dense, own = drawn(1, 5)
    assert damage_error({"pages": ("loss", None)}, {"pages": dense}, {"pages": own}) == 0.0
