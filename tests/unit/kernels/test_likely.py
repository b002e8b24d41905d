"""The kernel over logits, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsity_atlas import kernels
from sparsity_atlas.kernels import cuda_likely
from sparsity_atlas.models.logits.likelihoods import likelihoods
from sparsity_atlas.models.memory import CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 70, 4096, 9001])
def test_as_log_softmax_and_argmax(dtype: torch.dtype, width: int) -> None:
    logits = (5 * torch.randn(7, width, generator=torch.manual_seed(0))).to(dtype)
    logits[1] = 100.0
    logits[2, : width // 2] = -torch.inf
    logits[3] *= 1000 if dtype != torch.float16 else 10
    total, likeliest = cuda_likely.totals(logits)
    expected = F.log_softmax(logits.double(), -1)
    torch.testing.assert_close(
        logits.double() - total[:, None].double(), expected, rtol=1e-6, atol=1e-4
    )
    # Of several that are alike, the first.
    assert likeliest.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_rows_apart_in_memory() -> None:
    block = torch.randn(6, 5000)
    for some in (block[::2, :4500], block.T[:4]):
        total, likeliest = cuda_likely.totals(some)
        torch.testing.assert_close(total, some.logsumexp(-1))
        assert torch.equal(likeliest, some.argmax(-1))


def test_likelihoods_with_the_kernel_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = torch.randn(9, 300).split(4)
    rows, targets = np.array([0, 0, 3, 4, 8]), np.array([7, 299, 0, 31, int(pieces[2][0].argmax())])
    values, hits = likelihoods(pieces, rows, targets)
    assert hits[-1]
    monkeypatch.setattr(kernels, "totals", lambda _: cuda_likely.totals)
    found = likelihoods(pieces, rows, targets)
    torch.testing.assert_close(found[0], values)
    assert torch.equal(found[1], hits)


def test_parts_of_pieces_are_copied_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 300, requires_grad=True)
    rows, targets = np.arange(11), np.arange(11) * 25
    expected = F.log_softmax(logits, -1)[rows, targets]
    places = set()
    original = torch.log_softmax

    def recorded(*arguments: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        places.add((out.data_ptr(), out.shape[0]))
        return original(*arguments, out=out, **options)

    monkeypatch.setattr(torch, "log_softmax", recorded)
    monkeypatch.setitem(CHUNK, "cpu", 900)
    values, _ = likelihoods(logits.split(7), rows, targets)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    assert {rows for _, rows in places} == {1, 3}
    assert len({place for place, _ in places}) == 1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 4099])
def test_what_is_broken_stays_so(broken: float, place: int) -> None:
    logits = torch.randn(2, 4100)
    logits[1, place] = broken
    total, likeliest = cuda_likely.totals(logits)
    assert torch.isfinite(total[0])
    chosen = logits[1, :3] - total[1]
    assert not torch.isfinite(chosen).any()
    assert 0 <= int(likeliest[1]) < 4100


def test_a_row_without_any_number_is_broken() -> None:
    total, _ = cuda_likely.totals(torch.full((1, 5000), -torch.inf))
    assert not torch.isfinite(total).any()
