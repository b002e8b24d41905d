"""Neurons that are on together: known ones by hand, drawn ones pair by pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from sparsity_atlas.studies.coactivation import CoActivation
from sparsity_atlas.studies.token_masks import MaskTables
from sparsity_atlas.terms import PlaceKey


def found(kept: np.ndarray, neurons: int = 1000) -> dict[str, dict[str, float]]:
    counts = CoActivation(neurons)
    for sequence in kept:
        counts.add(torch.from_numpy(sequence[None]))
    return {row["quantity"]: row for row in counts.rows()}


def test_by_hand() -> None:
    # Neurons are on for tokens {0, 1}, {1, 2}, {} and {0, 1, 2} of four.
    kept = np.array([[[1, 0, 0, 1], [1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]], dtype=bool)
    rows = found(kept)
    pairs = rows["coactivation"]
    assert pairs["at"] == 3
    assert pairs["value"] == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)
    by_chance = [1 / 4 / (1 - 1 / 4), *[3 / 8 / (5 / 4 - 3 / 8)] * 2]
    assert pairs["by_frequency"] == pytest.approx(sum(by_chance) / 3)
    best = rows["best_partner"]
    assert best["value"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert best["by_frequency"] == pytest.approx((3 / 4 + 3 / 4 + 1 / 2) / 3)


def test_pair_by_pair() -> None:
    kept = np.random.default_rng(0).random((3, 20, 15)) < np.linspace(0, 0.9, 15)
    tokens = kept.reshape(-1, 15).T
    on = [row for row in tokens if row.any()]
    overlaps = [(a & b).sum() / (a | b).sum() for a, b in combinations(on, 2)]
    best = [max((a & b).sum() for b in on if b is not a) / a.sum() for a in on]
    rows = found(kept)
    assert rows["coactivation"]["value"] == pytest.approx(np.mean(overlaps))
    assert rows["best_partner"]["value"] == pytest.approx(np.mean(best))


def test_independent_neurons_are_together_as_often_as_chance_has_it() -> None:
    draw = np.random.default_rng(1)
    rows = found(draw.random((40, 100, 30)) < draw.random(30))
    pairs = rows["coactivation"]
    assert pairs["value"] == pytest.approx(pairs["by_frequency"], abs=0.01)


def test_a_sample_is_the_same_for_every_level_and_stated() -> None:
    kept = torch.rand(2, 8, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    tables = MaskTables(8, neurons=10)
    for level in ("0.9", "0.5"):
        tables.add(level, PlaceKey(0, "ffn", "gate"), kept)
    rows = [row for row in tables.table().to_pylist() if row["quantity"] == "coactivation"]
    assert [row["at"] for row in rows] == [10, 10]
    assert rows[0]["value"] == rows[1]["value"]


def test_of_neurons_that_are_never_on_nothing_is_said() -> None:
    assert found(np.zeros((1, 4, 5), dtype=bool)) == {}
