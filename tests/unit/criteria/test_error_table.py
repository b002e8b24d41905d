"""Thresholds by error: every target is met, or the next lower error that there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_atlas.criteria.error_table import LOWEST, MOST, ErrorTable, tabulate

TARGETS = (0.001, 0.005, 0.01, 0.03, 0.1, 0.25, 0.5, 0.8, 0.95, 0.999)


class Errors:
    """A power of the share of the squares that lies below a threshold."""

    def __init__(self, scores: np.ndarray, power: float = 0.5, most: float = 1.0) -> None:
        self.ranked = np.sort(scores).astype(np.float64)
        lost = np.append(0, np.square(self.ranked).cumsum())
        self.made = most * (lost / lost[-1]) ** power
        self.asked = 0

    def __call__(self, threshold: float) -> float:
        self.asked += 1
        return float(self.made[np.searchsorted(self.ranked, threshold)])


def scores(kind: str, count: int, seed: int) -> np.ndarray:
    normal = np.abs(np.random.default_rng(seed).standard_normal(count)).astype(np.float32)
    match kind:
        case "heavy":
            return normal**4
        case "zeros":
            return np.where(np.arange(count) % 12, 0, normal).astype(np.float32)
        case "tied":
            return np.round(3 * normal).astype(np.float32)
        case "equal":
            return np.ones_like(normal)
    return normal


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(("normal", "heavy", "zeros", "tied", "equal")),
    st.sampled_from((1, 2, 30, 1000, 50_000)),
    st.integers(0, 10**6),
    st.sampled_from((0.5, 1.0)),
    st.sampled_from((0.4, 1.0, 1.3)),
)
def test_a_target_is_met_or_the_next_lower_error_is(
    kind: str, count: int, seed: int, power: float, most: float
) -> None:
    drawn = scores(kind, count, seed)
    if not drawn.any():
        return
    error = Errors(drawn, power, most)
    table = tabulate(torch.from_numpy(drawn), error)
    assert error.asked < MOST
    table = ErrorTable.from_state(table.state())
    # What is lost below each distinct score, and all of it.
    attained = error.made[np.append(np.unique(error.ranked, return_index=True)[1], -1)]
    before = 0.0
    for target in TARGETS:
        threshold, met = table.at(target)
        assert threshold >= before
        before = threshold
        assert error(threshold) == pytest.approx(met, rel=0.005, abs=1e-9)
        # No error that there is lies between what is met and what is asked for.
        lower = attained[attained <= 0.995 * target].max()
        assert lower * 0.995 <= met <= target


def test_the_ends() -> None:
    table = tabulate(torch.tensor([0.0, 0.0, 1.0, 2.0]), Errors(np.array([0.0, 0, 1, 2])))
    assert table.at(0) == (0, 0)
    # What costs nothing is dropped, and no more.
    assert 0 < table.at(LOWEST)[0] < 1
    assert table.at(1) == (np.inf, 1)


def test_nothing_but_zeros_is_dropped_at_any_target() -> None:
    table = tabulate(torch.zeros(3), lambda _: 0.0)
    assert table.at(0)[0] == 0
    assert table.at(0.5) == (np.inf, 0)


def test_an_error_that_falls_again() -> None:
    """Outputs may cancel: the first threshold that reaches a target is taken, and thresholds still rise."""
    drawn = np.linspace(0.001, 1, 5000).astype(np.float32)

    def error(threshold: float) -> float:
        share = float((drawn < threshold).mean())
        return share - 0.1 * np.sin(np.pi * min(max((share - 0.4) / 0.2, 0), 1))

    table = tabulate(torch.from_numpy(drawn), error)
    found = [table.at(target) for target in np.linspace(0.01, 0.99, 99)]
    assert [threshold for threshold, _ in found] == sorted(threshold for threshold, _ in found)
    for target, (threshold, met) in zip(np.linspace(0.01, 0.99, 99), found, strict=True):
        assert error(threshold) == pytest.approx(met, rel=0.01)
        assert met == pytest.approx(target, rel=0.01)
