"""Sums over entries and tokens of sequences on CUDA, in Triton: what `sequence_sums` defines."""

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
from sparsity_atlas.kernels.prompts.order import LANES, RUN, first_of

if TYPE_CHECKING:
    from torch import Tensor

WARPS = 4
STEPS = LANES.bit_length() - 1  # until one sum of all is left
# Neurons of a program and its warps; tokens that are asked for at once.
BLOCK, BLOCK_WARPS, UNROLLED = 128, 1, 8


def energies(values: Tensor, counted: Tensor) -> Tensor:
    """As in `sequence_sums`."""
    values = values.contiguous()
    found = torch.empty(counted.shape, dtype=torch.float64, device=values.device)
    arguments = bits_of(values), counted.contiguous().view(torch.int8), found, values.shape[-1]
    own = {"HALF": values.dtype == torch.float16, "LANES": LANES, "STEPS": STEPS}
    _launch(_energies, (counted.numel(),), arguments, WARPS, own)
    return found


def over_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """As in `sequence_sums`."""
    values, weights = values.contiguous(), weights.contiguous()
    batch, tokens, width = values.shape
    blocks, runs = triton.cdiv(width, BLOCK), triton.cdiv(tokens, RUN)
    partial = torch.empty(batch, runs, width, dtype=torch.float64, device=values.device)
    own = {"HALF": values.dtype == torch.float16, "RUN": RUN, "BLOCK": BLOCK, "UNROLLED": UNROLLED}
    arguments = bits_of(values), weights, first_of(weights), partial, tokens, width
    _launch(_runs, (blocks, runs, batch), arguments, BLOCK_WARPS, own)
    if runs == 1:
        return partial[:, 0]
    sums = torch.empty(batch, width, dtype=torch.float64, device=values.device)
    _launch(_joined, (blocks, batch), (partial, sums, runs, width), BLOCK_WARPS, {"BLOCK": BLOCK})
    return sums


def spread(kept: Tensor, whole: Tensor) -> Tensor:
    """As in `sequence_sums`."""
    (batch, tokens), width = whole.shape, kept.shape[-1]
    mask = torch.empty(batch, tokens, width, dtype=torch.bool, device=kept.device)
    arguments = *(one.contiguous().view(torch.int8) for one in (kept, whole, mask)), tokens, width
    own = {"EACH": kept.shape[1] == tokens, "BLOCK": LANES}
    _launch(_spread, (batch * tokens,), arguments, WARPS, own)
    return mask


def leave_whole(whole: Tensor, values: Tensor, onto: Tensor, out: Tensor, zeros: Tensor) -> None:
    """As in `sequence_sums`."""
    tensors = (bits_of(one) for one in (values.contiguous(), onto.contiguous(), out))
    arguments = whole.contiguous().view(torch.int8), *tensors, zeros, values.shape[-1]
    _launch(_leave_whole, (whole.numel(),), arguments, WARPS, {"BLOCK": LANES})


def kept_by_ranks(values: Tensor, ranks: Tensor) -> Tensor:
    """As in `sequence_sums`."""
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
def _runs(
    values,
    weights,
    first,
    partial,
    tokens,
    width,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """A run of tokens."""
    row = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    begin = tl.load(first + row).to(tl.int32) + tl.program_id(1) * RUN
    weights += row * tokens
    values += row * tokens * width
    place = begin + tl.arange(0, RUN)
    most = tl.max(tl.load(weights + place, mask=place < tokens, other=0.0), 0)
    # Nothing of what has no weight.
    end = tl.where(most > 0, tl.minimum(begin + RUN, tokens), begin)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, UNROLLED):
        # All are asked for before the first is there.
        for step in tl.static_range(UNROLLED):
            token = start + step
            weight = tl.load(weights + token, mask=token < end, other=0.0)
            begins = values + tl.minimum(token, tokens - 1).to(tl.int64) * width
            one = tl.load(begins + column, mask=inside, other=0)
            total += _square(tl.where(weight > 0, one, 0), HALF) * weight
    runs = tl.num_programs(1)
    tl.store(partial + (row * runs + tl.program_id(1)) * width + column, total, mask=inside)


@triton.jit
def _joined(partial, sums, runs, width, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float64)
    for run in range(runs):
        total += tl.load(partial + (row * runs + run) * width + column, mask=inside, other=0.0)
    tl.store(sums + row * width + column, total, mask=inside)


@triton.jit
def _spread(kept, whole, mask, tokens, width, EACH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    everything = tl.load(whole + row)
    kept += (row if EACH else row // tokens) * width
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        one = tl.load(kept + column, mask=inside, other=0)
        tl.store(mask + row * width + column, one | everything, mask=inside)


@triton.jit
def _leave_whole(whole, values, onto, out, zeros, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # Nothing of a token that does not stay.
    stays = tl.load(whole + row) != 0
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tl.where(stays, width, 0), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(values + row * width + column, mask=inside, other=1)
        size = value & 0x7FFFFFFF if value.dtype == tl.int32 else value.to(tl.int32) & 0x7FFF
        count += (size == 0).to(tl.int32)
        one = tl.load(onto + row * width + column, mask=inside, other=0)
        tl.store(out + row * width + column, one, mask=inside)
    tl.store(zeros + row, tl.sum(count, 0), mask=stays)
