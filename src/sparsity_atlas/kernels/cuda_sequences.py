"""Sums over entries and tokens of sequences on CUDA, in Triton: what `sequences` defines."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparsity_atlas.kernels import cuda
from sparsity_atlas.kernels.cuda import bits_of
from sparsity_atlas.kernels.definition import Threshold
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
    arguments = bits_of(values), counted.contiguous().view(torch.int8), found, values.shape[-1]
    own = {"HALF": values.dtype == torch.float16, "LANES": LANES, "STEPS": STEPS}
    _launch(_energies, (counted.numel(),), arguments, WARPS, own)
    return found


def over_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """As in `sequences`."""
    values = values.contiguous()
    batch, tokens, width = values.shape
    sums = torch.empty(batch, width, dtype=torch.float64, device=values.device)
    grid = triton.cdiv(width, BLOCK), batch
    arguments = bits_of(values), weights.contiguous(), sums, tokens, width
    own = {"HALF": values.dtype == torch.float16, "BLOCK": BLOCK, "UNROLLED": UNROLLED}
    _launch(_over_tokens, grid, arguments, BLOCK // 32, own)
    return sums


def kept_by_ranks(values: Tensor, ranks: Tensor) -> Tensor:
    """As in `sequences`."""
    _, tokens, width = values.shape
    rows = values.reshape(-1, width)
    ones = rows.new_ones(width).expand(rows.shape)
    each = ranks.int().repeat_interleave(tokens)
    return cuda.masked(_half(width), rows, ones, each)[0].bool().view(values.shape)


@functools.cache
def _half(width: int) -> Threshold:
    """Where the search for any rank begins; see `prompt_mask._largest`."""
    return Threshold("rank", width // 2 + 1)


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: tuple[object, ...],
    warps: int,
    constants: dict[str, int | bool],
) -> None:
    if not all(grid):
        return
    values = arguments[0]
    assert isinstance(values, torch.Tensor)
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        # A product joined with an addition would be rounded once in place of twice.
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


@triton.jit
def _square(value, HALF: tl.constexpr):
    """Of a number given by its bits, in float64, which holds it exactly."""
    if value.dtype == tl.int32:
        number = value.to(tl.float32, bitcast=True)
    elif HALF:
        number = value.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    wide = number.to(tl.float64)
    return wide * wide


@triton.jit
def _energies(
    values,
    counted,
    found,
    width,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros((LANES,), tl.float64)
    # Nothing of what is not counted.
    end = tl.where(tl.load(counted + row) != 0, width, 0)
    for start in range(0, end, LANES):
        column = start + tl.arange(0, LANES)
        one = tl.load(values + row * width + column, mask=column < width, other=0)
        lanes += _square(one, HALF)
    # Two at a time, which is an order.
    for _ in tl.static_range(STEPS):
        lanes = tl.sum(tl.reshape(lanes, (lanes.shape[0] // 2, 2)), 1)
    tl.store(found + row + tl.arange(0, 1), lanes)


@triton.jit
def _over_tokens(
    values,
    weights,
    sums,
    tokens,
    width,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
):
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
            total += _square(tl.load(place, mask=column < end, other=0), HALF) * weight
    tl.store(sums + row * width + column, total, mask=column < width)
