"""What rows of logits say, on CUDA: each is read once, as it is, and no copy of it is made."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK, _WARPS = 4096, 8


def totals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp of each row in float32, and the place of its largest entry, the first of several.

    Args:
        logits: [rows, width] on one CUDA device.
    """
    rows, width = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    total = torch.empty(rows, dtype=torch.float32, device=logits.device)
    likeliest = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            _totals[(rows,)](
                *(logits, total, likeliest, width, logits.stride(0)), BLOCK=_BLOCK, num_warps=_WARPS
            )
    return total, likeliest


@triton.jit
def _totals(logits, total, likeliest, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK)
    # Of each lane: its largest entry, where that stands, and the sum of what all are beside it.
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    share = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + entry
        value = tl.load(logits + row * stride + column, mask=column < width, other=float("-inf"))
        value = value.to(tl.float32)
        larger = value > most
        beside = tl.where(larger, value, most)
        # Of a lane that has had nothing but minus infinity.
        none = beside == float("-inf")
        share = share * tl.exp(tl.where(none, 0.0, most - beside))
        share += tl.where(none & (value == value), 0.0, tl.exp(value - beside))
        place = tl.where(larger, column, place)
        most = beside
    largest = tl.max(most, 0)
    tl.store(total + row, largest + tl.log(tl.sum(share * tl.exp(most - largest), 0)))
    first = tl.min(tl.where(most == largest, place, width), 0)
    tl.store(likeliest + row, tl.minimum(first, width - 1).to(tl.int64))
