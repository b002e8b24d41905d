"""Masks that follow from no threshold, and masks put to use: every kernel against its definition in torch."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import matrices
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.kernels import cpu_masks, cuda_masks, patterns

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    # The products of hashes wrap.
    pytest.mark.filterwarnings("ignore:overflow encountered in scalar multiply:RuntimeWarning"),
]
MODULES = (cpu_masks, cuda_masks)
SIZES = st.sampled_from((2, 3, 4, 7, 16, 32))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions alone."""
    monkeypatch.setenv(kernels.VARIABLE, "reference")


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """[rows, width], some of them broken."""
    values = draw(matrices()).clone()
    for number in draw(st.lists(st.sampled_from((math.nan, -math.nan, math.inf, -math.inf)))):
        row = draw(st.integers(0, len(values) - 1))
        values[row, draw(st.integers(0, values.shape[1] - 1))] = number
    return values


@pytest.mark.parametrize("module", MODULES)
@settings(max_examples=25, deadline=None)
@given(values=rows(), size=SIZES, share=st.floats(0, 1))
def test_the_largest_of_groups(module: ModuleType, values: Tensor, size: int, share: float) -> None:
    kept = int(share * size)
    found = module.largest_of_groups(values, size, kept)
    for row, mask in zip(values.double().tolist(), found.tolist(), strict=True):
        for base in range(0, len(row), size):
            group = row[base : base + size]
            # NaN before all, then by size; Python's sort leaves ties in their order.
            ranked = sorted(range(len(group)), key=lambda i, group=group: order(group[i]))
            expected = [place in ranked[:kept] for place in range(len(group))]
            assert mask[base : base + size] == expected


def order(value: float) -> float:
    """What the largest magnitude has the least of."""
    return -math.inf if math.isnan(value) else -min(abs(value), 1e300)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("module", MODULES)
@settings(max_examples=25, deadline=None)
@given(values=rows(), size=SIZES, salt=st.integers(0, 2**62), share=st.floats(0, 1))
def test_the_same_masks_as_in_torch(
    module: ModuleType, values: Tensor, size: int, salt: int, share: float
) -> None:
    kept = int(share * size)
    groups = patterns.largest_of_groups(values, size, kept)
    assert torch.equal(module.largest_of_groups(values, size, kept), groups)
    draws = patterns.draws(values, salt)
    for limit in (share, 0.0, 1.0, draws[0, 0].item(), np.nextafter(draws[0, 0].item(), 1)):
        bound = math.ceil(limit * 2.0**patterns.DRAW_BITS)
        found = module.drawn(values, patterns.codes(values, salt), bound)
        assert torch.equal(found, draws < limit)


@pytest.mark.parametrize("module", MODULES)
@settings(max_examples=25, deadline=None)
@given(values=rows(), seed=st.integers(0, 99))
def test_a_mask_put_to_use(module: ModuleType, values: Tensor, seed: int) -> None:
    chosen = torch.Generator().manual_seed(seed)
    mask = torch.rand(values.shape, generator=chosen) < 0.5
    bits = torch.int32 if values.element_size() == 4 else torch.int16
    for onto in (values, values.flip(0), values.t().contiguous().t()):
        out, zeros, finite = module.applied(mask, values, onto)
        assert torch.equal(out.view(bits), torch.where(mask, onto.view(bits), 0))
        assert zeros.tolist() == [
            sum(not keep or value == 0 for keep, value in zip(*pair, strict=True))
            for pair in zip(mask.tolist(), values.tolist(), strict=True)
        ]
        assert finite.tolist() == torch.isfinite(values).all(-1).tolist()


def test_a_mask_for_sequences() -> None:
    """Of other dimensions, and one for all tokens of a sequence, which takes no memory of its own."""
    values = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[True, False, True, True], [False, False, True, True]])[:, None]
    found = kernels.by_mask(mask.expand(values.shape), values, -values)
    assert torch.equal(found.out, -values * mask)
    assert found.zeros.tolist() == [[2, 1, 1], [2, 2, 2]]
    assert found.finite.shape == (2, 3)
    assert found.mask is not None


def test_how_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(1, 4)
    assert kernels.masks_of(values) is cpu_masks
    assert kernels.masks_of(values.double()) is None
    assert kernels.masks_of(values[:, :0]) is None
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    assert kernels.masks_of(values) is None


def test_wide_groups_take_the_definition() -> None:
    values = torch.arange(200.0)[None]
    mask = patterns.largest_of_groups(values, 100, 3)
    assert mask.nonzero()[:, 1].tolist() == [97, 98, 99, 197, 198, 199]
