"""Evolution over blocks: the mean that is kept, optima known by hand and by trying all, both stages."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_atlas.calibrate import evolution
from sparsity_atlas.calibrate.allocation_cost import candidates
from sparsity_atlas.calibrate.evolution import Blocks, Candidate, evolve, over_blocks

TARGETS = np.linspace(0, 1, 101)
ONE = TARGETS[None]


@pytest.mark.parametrize(("weights", "best"), [((1, 1), (0.8, 0.2)), ((2, 1), (0.55, 0.4))])
def test_an_optimum_by_hand(weights: tuple[int, int], best: tuple[float, float]) -> None:
    """s² + 4 s² is least at 0.8 and 0.2; with weights 2 and 1, s² + a s² where s₁ / 2 = a s₂.

    There the first moves by 0.025 where the second moves by 0.05: s₁ = 0.55 and s₂ = 0.4, of a = 0.6875.
    """
    blocks = Blocks(np.array(weights, float), refinable=False)
    factor = 4 if weights == (1, 1) else 0.6875

    def cost(one: Candidate) -> float:
        first, second = blocks.sparsities(one, 0.5)
        return first**2 + factor * second**2

    found = evolve(cost, blocks, 0.5, seed=0)
    assert blocks.sparsities(min(found, key=found.__getitem__), 0.5) == pytest.approx(best)


def all_of(blocks: Blocks, target: float) -> list[Candidate]:
    """Every candidate that fits."""
    count = len(blocks.weights)
    most = round(1 / evolution.STEP)
    every = (
        Candidate(steps, refined)
        for steps in product(range(-most, most + 1), repeat=count)
        if sum(steps) == 0
        for refined in product((False, True) if blocks.refinable else (False,), repeat=count)
    )
    return [one for one in every if blocks.fits(one, target)]


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Against a search of everything, of a cost in which blocks go together."""
    monkeypatch.setattr(evolution, "STEP", 0.2)
    draw = np.random.default_rng(seed)
    square = draw.normal(size=(3, 3))
    square = square @ square.T
    gains = draw.normal(size=3)
    blocks = Blocks(np.array([1.0, 1.0, 2.0]), refinable=True)

    def cost(one: Candidate) -> float:
        own = blocks.sparsities(one, 0.4)
        return float(own @ square @ own + gains @ one.refined)

    every = all_of(blocks, 0.4)
    assert len(every) > 60
    found = evolve(cost, blocks, 0.4, seed=seed)
    assert min(found.values()) == min(map(cost, every))
    assert len(found) < len(every)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.floats(0.01, 0.99),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_mean_is_kept_and_nothing_is_worse_than_even(
    weights: list[int], target: float, refinable: bool, seed: int
) -> None:
    blocks = Blocks(np.array(weights, float), refinable)
    chance = np.random.default_rng(seed)
    found = evolve(lambda _: float(chance.random()), blocks, target, seed)
    even = list(blocks.even())
    assert list(found)[: len(even)] == even
    assert min(found.values()) <= min(found[one] for one in even)
    assert len(found) <= candidates(len(weights))
    for one in found:
        own = blocks.sparsities(one, target)
        assert np.average(own, weights=weights) == pytest.approx(target, abs=1e-12)
        assert (own > -1e-9).all()
        assert (own < 1 + 1e-9).all()


def test_the_same_seed_tries_the_same() -> None:
    blocks = Blocks(np.ones(4), refinable=True)

    def cost(one: Candidate) -> float:
        return float(np.square(one.steps) @ [3, 1, 4, 1]) + sum(one.refined)

    tried = [list(evolve(cost, blocks, 0.3, seed).items()) for seed in (7, 7, 8)]
    assert tried[0] == tried[1] != tried[2]


def test_steps_are_given_back_until_another_target_is_met() -> None:
    blocks = Blocks(np.ones(3), refinable=False)
    one = Candidate((6, 0, -6), (False,) * 3)
    assert blocks.drawn_in(one, 0.5) == one
    assert blocks.drawn_in(one, 0.8).steps == (4, 0, -4)
    assert blocks.drawn_in(one, 0.99).steps == (0, 0, 0)


def test_a_single_block_has_nobody_to_exchange_with() -> None:
    table = over_blocks(lambda own: float(own.sum()), [ONE], np.array([2.0]), TARGETS)
    assert table == pytest.approx(ONE)


def test_blocks_first_and_then_what_is_in_them() -> None:
    """Two blocks of two tensors: both tensors of a block read as many parameters as the other's.

    Only the second tensor of the first block, and the first one of the second, hurts. Greedy division helps
    the first block, and harms the other, where it is the wrong way round.
    """
    aside = np.array([np.minimum(2 * TARGETS, 1), np.maximum(2 * TARGETS - 1, 0)])
    hurts = np.array([0.0, 1.0, 3.0, 0.0])

    def cost(own: np.ndarray) -> float:
        return float(hurts @ own**2)

    table = over_blocks(cost, [aside, aside], np.array([4.0, 4.0]), TARGETS)
    # In all of it the mean over parameters is the target.
    assert table.mean(0) == pytest.approx(TARGETS)
    assert (table >= 0).all()
    assert (table <= 1).all()
    assert table[:, 0] == pytest.approx(np.zeros(4))
    assert table[:, -1] == pytest.approx(np.ones(4))
    # At 0.5 the first block gives its first tensor whole: (2 s - 1)² + 3 t² is least, over s + t = 1 in
    # steps of 0.05, at s = 0.7 and t = 0.3.
    assert table[:, 50] == pytest.approx([1, 0.4, 0.3, 0.3])
    for level in (10, 30, 50, 70, 90):
        even = [np.full(4, TARGETS[level]), np.concatenate([aside[:, level]] * 2)]
        assert cost(table[:, level]) <= min(map(cost, even))
