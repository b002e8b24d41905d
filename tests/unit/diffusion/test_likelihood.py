"""The bound of a likelihood: by hand, over all orders of filling in, and as an unbiased estimate."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from masked_diffusion import MASK, logits_by_hand, save_diffusion
from sparsity_atlas.diffusion.denoise import Asked, denoiser, told_by
from sparsity_atlas.diffusion.likelihood import bounds
from sparsity_atlas.diffusion.mask_sets import mask_sets
from sparsity_atlas.diffusion.rows import Request, Rows, rows_of
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.files.whole import digest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load

CPU = torch.device("cpu")
# Of the error of a mean over many seeds. Seeds are fixed, so that a test that passes goes on to pass.
ERRORS = 3.5


def seed(number: int) -> str:
    return digest(number)


class Table:
    """A made-up model of an answer: −log p of each token for each set of masked tokens."""

    def __init__(self, length: int) -> None:
        draw = np.random.default_rng(length)
        self.length = length
        self.sets = [
            frozenset(some)
            for size in range(1, length + 1)
            for some in itertools.combinations(range(length), size)
        ]
        # More masks, less certainty, and some tokens harder than others.
        self.cost = {
            (one, some): draw.gamma(1.0) * len(some) * (1 + one)
            for some in self.sets
            for one in some
        }

    def sum(self, masked: np.ndarray) -> float:
        some = frozenset(np.flatnonzero(masked).tolist())
        return sum(self.cost[one, some] for one in some)

    def over_orders(self) -> float:
        """The mean of −log p over all orders in which the tokens can be filled in."""
        totals = []
        for order in itertools.permutations(range(self.length)):
            left = [frozenset(order[place:]) for place in range(self.length)]
            totals.append(sum(self.cost[one, some] for one, some in zip(order, left, strict=True)))
        return float(np.mean(totals))

    def estimate(self, samples: int, number: int) -> float:
        sets = mask_sets(self.length, samples, seed(number))
        assert len(sets.masked) <= samples
        return sum(w * self.sum(m) for m, w in zip(sets.masked, sets.weights, strict=True))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_all_sets_are_all_orders(length: int) -> None:
    table = Table(length)
    for samples in (2**length - 1, 128):
        sets = mask_sets(length, samples, seed(0))
        assert sets.exact
        assert len({one.tobytes() for one in sets.masked}) == len(sets.masked) == 2**length - 1
        assert table.estimate(samples, 0) == pytest.approx(table.over_orders(), rel=1e-12)
        assert sets.weights @ sets.masked.sum(1) == pytest.approx(length, rel=1e-12)


def test_one_sample_fewer_is_an_estimate() -> None:
    assert not mask_sets(5, 30, seed(0)).exact
    assert mask_sets(5, 31, seed(0)).exact
    # 127 sets of 7 tokens in 128 samples; not of 8.
    assert mask_sets(7, 128, seed(0)).exact
    assert not mask_sets(8, 128, seed(0)).exact


def deviation(estimate: Callable[[int], float], exact: float, seeds: int) -> float:
    """How far the mean over some seeds lies from what it should be, in its standard error."""
    found = np.array([estimate(number) for number in range(seeds)])
    return float((found.mean() - exact) / (found.std(ddof=1) / seeds**0.5))


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 8, 12, 20, 30])
def test_the_estimate_is_unbiased(samples: int) -> None:
    """Fewer samples than tokens, as many, and nearly all sets."""
    table = Table(5)
    exact = table.over_orders()
    assert abs(deviation(lambda number: table.estimate(samples, number), exact, 2000)) < ERRORS


def published(length: int, samples: int, draw: np.random.Generator) -> np.ndarray:
    """Numbers of masked tokens as LLaDA's evaluation has them, which rounds halves to even."""
    first = int(draw.integers(1, length + 1))
    last = first + (samples - 1) * (length / samples)
    grid = torch.round(torch.linspace(float(first), last, steps=samples)).long()
    return ((grid - 1) % length + 1).numpy()


def test_the_published_rounding_would_fail() -> None:
    """With 8 samples of 4 tokens it takes 2 and 4 masks three times as often as 1 and 3."""
    table = Table(4)

    def estimate(number: int) -> float:
        draw = np.random.default_rng(number)
        found = []
        for size in published(4, 8, draw):
            masked = np.zeros(4, dtype=bool)
            masked[draw.permutation(4)[:size]] = True
            found.append(4 / size * table.sum(masked))
        return float(np.mean(found))

    exact = table.over_orders()
    assert abs(deviation(estimate, exact, 2000)) > 2 * ERRORS
    assert abs(deviation(lambda number: table.estimate(8, number), exact, 2000)) < ERRORS
    draw = np.random.default_rng(0)
    shares = Counter(np.concatenate([published(4, 8, draw) for _ in range(2000)]).tolist())
    assert shares[2] > 2 * shares[1]
    assert shares[4] > 2 * shares[3]


@pytest.mark.parametrize(("length", "samples"), [(5, 3), (7, 4), (12, 8), (100, 32)])
def test_each_number_of_masks_comes_up_as_often(length: int, samples: int) -> None:
    """Of an answer of more tokens than samples."""
    seeds = 3000
    counts = Counter(
        size
        for number in range(seeds)
        for size in mask_sets(length, samples, seed(number)).masked.sum(1).tolist()
    )
    wanted = seeds * samples / length
    assert set(counts) == set(range(1, length + 1))
    assert max(abs(count - wanted) for count in counts.values()) < 4.5 * wanted**0.5


def rows_of_all(request: Request, beside: Request | None = None) -> Rows:
    """All rows of a request, behind those of another one."""
    asked = [request] if beside is None else [beside, request]
    number = np.repeat(np.arange(len(asked)), 16)
    place = np.tile(np.arange(16), len(asked))
    settings = {"samples": 16, "mask_token": MASK, "padding": 0}
    return rows_of(asked, number, place, np.arange(len(number)), **settings)


def test_masks_follow_from_what_is_asked() -> None:
    request = Request((1, 2, 3), tuple(range(10, 22)))
    rows = rows_of_all(request)
    other = rows_of_all(Request((1, 2), request.answer))
    assert np.array_equal(
        rows_of_all(request, Request((8,), (9,) * 20)).tokens[16:, :15], rows.tokens
    )
    assert not np.array_equal(rows.tokens[:, 1:] == MASK, other.tokens == MASK)
    assert rows.lengths.tolist() == [15] * 16
    assert rows.prompts.tolist() == [3] * 16
    for number, tokens in enumerate(rows.tokens.tolist()):
        masked = [place for place, token in enumerate(tokens) if token == MASK]
        own = slice(*[*rows.starts, len(rows.targets)][number : number + 2])
        assert (rows.where[rows.predicted[own]] - number * 15).tolist() == masked
        for place, target in zip(masked, rows.targets[own].tolist(), strict=True):
            tokens[place] = target
        assert tokens == [1, 2, 3, *range(10, 22)]


def test_a_row_that_tells_several_readings() -> None:
    """Options of one token, and a sentence beside one that differs in a masked word."""
    asked = [Request((1,), (5,)), Request((1,), (6,)), Request((4, 4), (7, 8))]
    number, row = np.array([0, 1, 2, 2]), np.array([0, 0, 1, 2])
    settings = {"samples": 3, "mask_token": MASK, "padding": 0}
    rows = rows_of(asked, number, np.array([0, 0, 0, 2]), row, **settings)
    assert rows.tokens.tolist() == [[1, MASK, 0, 0], [4, 4, MASK, 8], [4, 4, MASK, MASK]]
    assert rows.valid.sum(1).tolist() == [2, 4, 4]
    assert rows.where.tolist() == [1, 6, 10, 11]
    assert rows.predicted.tolist() == [0, 0, 1, 2, 3]
    assert rows.targets.tolist() == [5, 6, 7, 7, 8]
    assert rows.starts.tolist() == [0, 1, 2, 3]
    assert rows.weights.tolist() == [1.0, 1.0, 0.5, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion") / "m")


REQUESTS = [
    Request((5, 9, 33, 70), (12, 80, 41)),
    Request((5,), (12, 80)),
    Request((), (7, 8, 9)),
    Request((5, 9, 33, 70, 11, 12, 13), (200,)),
    Request((8, 8), tuple(range(20, 29))),
]


def by_hand(folder: Path, request: Request, shifted: bool, guidance: float) -> float:
    """All sets of masked tokens, one by one, each over its weight."""
    length, begin = len(request.answer), len(request.prompt)
    total = 0.0
    for size in range(1, length + 1):
        for some in itertools.combinations(range(length), size):
            ids = torch.tensor([*request.prompt, *request.answer])
            ids[[begin + one for one in some]] = MASK
            logits = logits_by_hand(folder, ids[None])[0].double()
            if guidance:
                bare = torch.where(torch.arange(len(ids)) < begin, MASK, ids)
                without = logits_by_hand(folder, bare[None])[0].double()
                logits = without + (guidance + 1) * (logits - without)
            likely = logits.log_softmax(-1)
            for one in some:
                place = begin + one
                told = place - 1 if shifted and place > 0 else place
                total += likely[told, request.answer[one]].item() / (size * math.comb(length, size))
    return total


@pytest.mark.parametrize("guidance", [0.0, 0.5])
@pytest.mark.parametrize("shifted", [False, True])
def test_bounds_are_those_by_hand(folder: Path, shifted: bool, guidance: float) -> None:
    model = load(Checkpoint(folder), device="cpu")
    settings = {"samples": 8, "mask_token": MASK, "padding": 0, "device": CPU}
    denoise = denoiser(model, shifted=shifted)
    requests = REQUESTS[:4]
    wanted = [by_hand(folder, one, shifted, guidance) for one in requests]
    for batch_size in (1, 5, 100):
        found = bounds(denoise, requests, batch_size=batch_size, guidance=guidance, **settings)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_batches_and_company_change_nothing(folder: Path) -> None:
    model = load(Checkpoint(folder), device="cpu")
    settings = {"samples": 6, "mask_token": MASK, "padding": 0, "device": CPU}
    denoise = denoiser(model, shifted=False)
    whole = bounds(denoise, REQUESTS, batch_size=7, **settings)
    backwards = bounds(denoise, REQUESTS[::-1], batch_size=3, **settings)[::-1]
    alone = [bounds(denoise, [one], batch_size=1, **settings)[0] for one in REQUESTS]
    assert whole == pytest.approx(alone, rel=1e-5)
    assert whole == pytest.approx(backwards, rel=1e-5)


def test_padding_on_either_side_is_not_seen(folder: Path) -> None:
    """Rows are padded behind; a batch that comes padded in front is answered alike."""
    model = load(Checkpoint(folder), device="cpu")
    for shifted in (False, True):
        denoise = denoiser(model, shifted=shifted)
        ids = torch.tensor([[5, MASK, 7]])
        where = torch.tensor([0, 1, 2])
        ones = torch.ones_like(ids, dtype=torch.bool)
        plain = torch.cat(list(denoise(Asked(ids, ones, where, ~ones))))
        front = torch.cat([torch.full((1, 4), 9), ids], dim=1)
        valid = torch.arange(7)[None] >= 4
        padded = torch.cat(list(denoise(Asked(front, valid, where + 4, ~valid))))
        torch.testing.assert_close(plain, padded, rtol=1e-4, atol=1e-4)


def test_where_shifted_logits_stand() -> None:
    valid = torch.tensor([[True, True, True], [False, True, True]])
    told = told_by(valid, torch.tensor([0, 1, 2, 4, 5]))
    assert told.tolist() == [0, 0, 1, 4, 4]


def test_logits_that_are_no_numbers(folder: Path) -> None:
    model = load(Checkpoint(folder), device="cpu")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericalFailure, match="NaN or infinity in the logits"):
        bounds(
            denoiser(model, shifted=False),
            REQUESTS[:1],
            **{"samples": 4, "batch_size": 4, "mask_token": MASK, "padding": 0, "device": CPU},
        )
