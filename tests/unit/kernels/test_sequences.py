"""Sums over sequences: every kernel and the definition against the order that is laid down, to the bit."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_kernels import matrices
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.kernels import cpu
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.kernels.prompts import cpu_sequences, cuda_sequences, sequence_sums

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered in reduce:RuntimeWarning"),
]
PATHS = pytest.mark.parametrize(
    "path", [cpu_sequences, cuda_sequences, sequence_sums], ids=["cpu", "cuda", "definition"]
)
BROKEN = (math.nan, -math.nan, math.inf, -math.inf)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sequences` itself is the definition in torch."""
    monkeypatch.setenv(kernels.VARIABLE, "reference")


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """[batch, tokens, width], some of it broken, and which tokens count."""
    values = draw(matrices()).clone()
    for number in draw(st.lists(st.sampled_from(BROKEN), max_size=3)):
        row = draw(st.integers(0, len(values) - 1))
        values[row, draw(st.integers(0, values.shape[1] - 1))] = number
    batch = draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(0, len(values) - 1), min_size=batch, max_size=20))
    rows = rows[: len(rows) // batch * batch]
    counted = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    width = values.shape[1]
    return values[rows].view(batch, -1, width), torch.tensor(counted).view(batch, -1)


def in_order(values: Tensor, counted: Tensor) -> list[list[float]]:
    """Energies, by single additions."""
    found = []
    for sequence, chosen in zip(values.double().tolist(), counted.tolist(), strict=True):
        found.append(
            [energy(row) if take else 0.0 for row, take in zip(sequence, chosen, strict=True)]
        )
    return found


def energy(row: list[float]) -> float:
    sums = [0.0] * sequence_sums.LANES
    for place, value in enumerate(row):
        sums[place % sequence_sums.LANES] += value * value
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def over_tokens(values: Tensor, weights: Tensor) -> list[list[float]]:
    """Σ weight · v², by single additions."""
    found = []
    for sequence, factors in zip(values.double().tolist(), weights.tolist(), strict=True):
        first = next((place for place, factor in enumerate(factors) if factor > 0), 0)
        total = [0.0] * values.shape[-1]
        for start in range(first, len(factors), sequence_sums.RUN):
            end = start + sequence_sums.RUN
            run = [0.0] * values.shape[-1]
            for row, factor in zip(sequence[start:end], factors[start:end], strict=True):
                if factor > 0:
                    run = [
                        one + value * value * factor for one, value in zip(run, row, strict=True)
                    ]
            total = [one + other for one, other in zip(total, run, strict=True)]
        found.append(total)
    return found


def same(found: Tensor, expected: list[list[float]]) -> None:
    assert found.dtype == torch.float64
    # NaN equals itself here, whatever its bits.
    assert repr(found.tolist()).replace("-nan", "nan") == repr(expected).replace("-nan", "nan")


# Interpreted, a row takes a tenth of a second.
@pytest.mark.usefixtures("plain")
@PATHS
@settings(max_examples=15, deadline=None, phases=set(Phase) - {Phase.shrink})
@given(drawn=batches(), seed=st.integers(0, 99))
def test_sums_in_the_order_that_is_written_down(
    path: ModuleType, drawn: tuple[Tensor, Tensor], seed: int
) -> None:
    values, counted = drawn
    energies = path.energies(values, counted)
    same(energies, in_order(values, counted))
    for weights in (
        torch.where((energies > 0) & (energies < torch.inf), 1 / energies, 0),
        counted * torch.rand(counted.shape, generator=torch.manual_seed(seed)).double(),
    ):
        same(path.over_tokens(values, weights), over_tokens(values, weights))


@pytest.mark.usefixtures("plain")
@PATHS
@pytest.mark.parametrize("width", [sequence_sums.LANES, 2 * sequence_sums.LANES + 3])
def test_rows_wider_than_the_lanes(path: ModuleType, width: int) -> None:
    values = torch.randn(2, 3, width, generator=torch.manual_seed(width))
    counted = torch.tensor([[True, True, False], [False, True, True]])
    same(path.energies(values, counted), in_order(values, counted))
    weights = torch.rand(2, 3, generator=torch.manual_seed(1)).double()
    same(path.over_tokens(values, weights), over_tokens(values, weights))


@pytest.mark.usefixtures("plain")
@PATHS
def test_prompts_longer_than_a_run(path: ModuleType) -> None:
    """With padding before them, gaps among them, and one that ends within its second run."""
    tokens = 2 * sequence_sums.RUN + 9
    values = torch.randn(2, tokens, 3, generator=torch.manual_seed(5)) ** 5
    weights = torch.rand(2, tokens, generator=torch.manual_seed(6)).double()
    weights[0, :7], weights[0, 30:40], weights[1, sequence_sums.RUN + 3 :] = 0, 0, 0
    same(path.over_tokens(values, weights), over_tokens(values, weights))
    later = torch.cat([0 * values[:, :50] + torch.nan, values], 1)
    moved = torch.cat([0 * weights[:, :50], weights], 1)
    assert torch.equal(path.over_tokens(later, moved), path.over_tokens(values, weights))


@pytest.mark.usefixtures("plain")
@PATHS
def test_masks_of_tokens_are_those_of_their_sequence(path: ModuleType) -> None:
    whole = torch.rand(3, 5, generator=torch.manual_seed(2)) < 0.5
    for tokens in (1, 5):
        kept = torch.rand(3, tokens, 1100, generator=torch.manual_seed(tokens)) < 0.5
        assert torch.equal(path.spread(kept, whole), kept | whole[..., None])


@pytest.mark.usefixtures("plain")
@PATHS
def test_padding_company_and_threads_change_nothing(
    path: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: a sequence by itself, and between others, with padding, by many threads."""
    one = torch.randn(1, 21, 1100, generator=torch.manual_seed(3)) ** 3
    own = torch.rand(1, 21, generator=torch.manual_seed(4)).double()
    wide = torch.full((3, 31, 1100), torch.nan)
    wide[1, 9:30], wide[0], wide[2, 3] = one[0], 1e9, 5
    weights = torch.zeros(3, 31, dtype=torch.float64)
    weights[1, 9:30], weights[0, 3:] = own[0], 1
    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    alone = path.over_tokens(one, own)[0]
    energies = path.energies(one, own > 0)[0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            assert torch.equal(path.over_tokens(wide, weights)[1], alone)
            assert torch.equal(path.energies(wide, weights > 0)[1, 9:30], energies)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "module", [cpu_sequences, cuda_sequences, None], ids=["cpu", "cuda", "torch"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_stay(
    module: ModuleType | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_sums, "_module", lambda values: module)
    values = torch.randn(2, 5, 1100, generator=torch.manual_seed(1)).to(dtype)
    values[:, :, ::3], values[:, :, 1::7] = 0.0, -0.0
    whole = torch.rand(2, 5, generator=torch.manual_seed(2)) < 0.5
    mask = torch.rand(values.shape, generator=torch.manual_seed(3)) < 0.5
    for onto in (values, values.flip(-1) + 1):
        for made in (mask, None):
            found = kernels.by_mask(mask, values, onto)._replace(mask=made)
            before = values.clone(), onto.clone()
            left = sequence_sums.left_whole(found, whole, values, onto)
            stays = mask | whole[..., None]
            assert torch.equal(left.out, torch.where(stays, onto, 0))
            assert left.zeros.tolist() == (~stays | (values == 0)).sum(-1).tolist()
            assert torch.equal(left.finite, found.finite)
            assert (left.mask is None) if made is None else torch.equal(left.mask, stays)
            assert torch.equal(values, before[0])
            assert torch.equal(onto, before[1])
        # What a rule gave back as it is stays so.
        given = found._replace(out=onto, zeros=found.zeros.clone())
        sequence_sums.left_whole(given, whole, values, onto)
        assert torch.equal(onto, before[1])


@settings(max_examples=25, deadline=None, phases=set(Phase) - {Phase.shrink})
@given(drawn=batches(), shares=st.lists(st.floats(0, 1), min_size=3, max_size=3))
@pytest.mark.parametrize("path", [sequence_sums, cuda_sequences], ids=["cpu", "cuda"])
def test_as_many_of_each_token_as_its_sequence_says(
    path: ModuleType, drawn: tuple[Tensor, Tensor], shares: list[float]
) -> None:
    values, _ = drawn
    ranks = torch.tensor([int(share * values.shape[-1]) for share in shares[: len(values)]])
    found = path.kept_by_ranks(values, ranks)
    for sequence, rank, kept in zip(values, ranks.tolist(), found, strict=True):
        assert torch.equal(kept, Threshold("rank", rank).mask(sequence))


def test_how_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(1, 1, 4)
    assert sequence_sums._module(values) is cpu_sequences
    assert sequence_sums._module(values.double()) is None
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    assert sequence_sums._module(values) is None
