"""Sums over entries and tokens of sequences on CUDA, in Triton: what `sequences` defines."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparsity_atlas.kernels.sequences import LANES

if TYPE_CHECKING:
    from torch import Tensor

WARPS = 4
STEPS = LANES.bit_length() - 1  # until one sum of all is left
# Neurons of a program, a thread each; tokens that are asked for at once.
BLOCK, UNROLLED = 64, 16


def energies(values: Tensor, counted: Tensor) -> Tensor:
    """As in `sequences`."""
    values = values.contiguous()
    found = torch.empty(counted.shape, dtype=torch.float64, device=values.device)
    arguments = values, counted.contiguous().view(torch.int8), found, values.shape[-1]
    _launch(_energies, (counted.numel(),), arguments, WARPS, LANES=LANES, STEPS=STEPS)
    return found


def over_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """As in `sequences`."""
    values = values.contiguous()
    batch, tokens, width = values.shape
    sums = torch.empty(batch, width, dtype=torch.float64, device=values.device)
    grid = triton.cdiv(width, BLOCK), batch
    arguments = values, weights.contiguous(), sums, tokens, width
    _launch(_over_tokens, grid, arguments, BLOCK // 32, BLOCK=BLOCK, UNROLLED=UNROLLED)
    return sums


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: tuple[object, ...],
    warps: int,
    **constants: int,
) -> None:
    if not all(grid):
        return
    values = arguments[0]
    assert isinstance(values, torch.Tensor)
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        # A product joined with an addition would be rounded once in place of twice.
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


@triton.jit
def _energies(values, counted, found, width, LANES: tl.constexpr, STEPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros((LANES,), tl.float64)
    # Nothing of what is not counted.
    end = tl.where(tl.load(counted + row) != 0, width, 0)
    for start in range(0, end, LANES):
        column = start + tl.arange(0, LANES)
        one = tl.load(values + row * width + column, mask=column < width, other=0.0)
        wide = one.to(tl.float32).to(tl.float64)
        lanes += wide * wide
    # Two at a time, which is an order.
    for _ in tl.static_range(STEPS):
        lanes = tl.sum(tl.reshape(lanes, (lanes.shape[0] // 2, 2)), 1)
    tl.store(found + row + tl.arange(0, 1), lanes)


@triton.jit
def _over_tokens(values, weights, sums, tokens, width, BLOCK: tl.constexpr, UNROLLED: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values += row * tokens * width
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tokens, UNROLLED):
        for step in tl.static_range(UNROLLED):
            token = start + step
            weight = tl.load(weights + row * tokens + token, mask=token < tokens, other=0.0)
            end = tl.where(weight > 0, width, 0)
            place = values + token.to(tl.int64) * width + column
            one = tl.load(place, mask=column < end, other=0.0)
            wide = one.to(tl.float32).to(tl.float64)
            total += wide * wide * weight
    tl.store(sums + row * width + column, total, mask=column < width)
