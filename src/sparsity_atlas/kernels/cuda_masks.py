"""Masks on CUDA, in Triton: what `patterns` defines, and a mask put to use in one launch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparsity_atlas.kernels.cuda import bits_of
from sparsity_atlas.kernels.definition import INFINITIES

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_BLOCK = 2048
WARPS = 4
# Of draws: rows of a program, and entries of each at a time.
DRAWN_ROWS, DRAWN_BLOCK = tl.constexpr(4), 512
# SplitMix64's output function, see `patterns`, and what is left of a shift to the right.
FIRST, SECOND = tl.constexpr(-0x40A7B892E31B1A47), tl.constexpr(-0x6B2FB644ECCEEE15)
LEFT_30, LEFT_27 = tl.constexpr((1 << 34) - 1), tl.constexpr((1 << 37) - 1)
LEFT_31, LEFT_11 = tl.constexpr((1 << 33) - 1), tl.constexpr((1 << 53) - 1)
# The lowest and the highest bits of both halves.
EACH, HIGHEST = tl.constexpr(0x00010001), tl.constexpr(-0x7FFF8000)


def applied(mask: Tensor, values: Tensor, onto: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.by_mask`, for tensors [rows, width] on one device."""
    rows, width = values.shape
    mask, values, onto = (
        one if one.stride(-1) == 1 else one.contiguous() for one in (mask, values, onto)
    )
    out = torch.empty((rows, width), dtype=onto.dtype, device=onto.device)
    zeros = torch.empty(rows, dtype=torch.int32, device=values.device)
    finite = torch.empty(rows, dtype=torch.bool, device=values.device)
    arguments = (
        *(mask.view(torch.int8), *map(bits_of, (values, onto, out))),
        *(zeros, finite.view(torch.int8), width),
        *(mask.stride(0), values.stride(0), onto.stride(0)),
    )
    _launch(_apply, arguments, values, INFINITY=INFINITIES[values.dtype], BLOCK=_block(values))
    return out, zeros, finite


def largest_of_groups(values: Tensor, size: int, kept: int) -> Tensor:
    """As in `patterns`."""
    values = values if values.stride(-1) == 1 else values.contiguous()
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    arguments = bits_of(values), mask.view(torch.int8), values.shape[1], values.stride(0), kept
    kernel = _largest if values.element_size() == 4 else _largest_in_pairs
    _launch(kernel, arguments, values, **_groups(values, size))
    return mask


def _groups(values: Tensor, size: int) -> dict[str, int]:
    """How groups of a size are taken."""
    places = triton.next_power_of_2(size)
    groups = min(LARGEST_BLOCK // places, triton.next_power_of_2(-(-values.shape[1] // size)))
    return {
        "INFINITY": INFINITIES[values.dtype],
        **{"SIZE": size, "PLACES": places, "GROUPS": groups},
    }


def _block(values: Tensor) -> int:
    """How many entries of a row the other kernels take at a time."""
    block: int = min(LARGEST_BLOCK, triton.next_power_of_2(values.shape[1]))
    return block


def drawn(values: Tensor, codes: Tensor, bound: int) -> Tensor:
    """The draws of `patterns` that lie below bound / 2^53; see `cpu_masks.drawn`."""
    values = values if values.stride(-1) == 1 else values.contiguous()
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    limits = torch.full((1,), bound, dtype=torch.int64, device=values.device)
    arguments = (
        *(bits_of(values), mask.view(torch.int8), codes, limits),
        *(*values.shape, values.stride(0)),
    )
    own = {"INFINITY": INFINITIES[values.dtype], "BLOCK": min(DRAWN_BLOCK, _block(values))}
    _launch(_draw, arguments, values, DRAWN_ROWS.value, **own)
    return mask


def _launch(
    kernel: triton.JITFunction,
    arguments: tuple[object, ...],
    values: Tensor,
    each: int = 1,
    **constants: int,
) -> None:
    """A program for each row of the values, or for so many."""
    rows = len(values)
    if rows == 0:
        return
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        kernel[(triton.cdiv(rows, each),)](*arguments, **constants, num_warps=WARPS)


@triton.jit
def _magnitude(value):
    """A bit pattern without its sign, as int32."""
    if value.dtype == tl.int32:
        return value & 0x7FFFFFFF
    return value.to(tl.int32) & 0x7FFF


@triton.jit
def _apply(
    mask,
    values,
    onto,
    out,
    zeros,
    finite,
    width,
    mask_stride,
    values_stride,
    onto_stride,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Added up over threads at the end.
    count, largest = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        kept = tl.load(mask + row * mask_stride + column, mask=inside, other=1) != 0
        size = _magnitude(tl.load(values + row * values_stride + column, mask=inside, other=1))
        written = tl.load(onto + row * onto_stride + column, mask=inside, other=0)
        zero = (kept == 0) | (size == 0)
        count += zero.to(tl.int32)
        largest = tl.maximum(largest, size)
        tl.store(out + row * width + column, tl.where(kept, written, 0), mask=inside)
    tl.store(zeros + row, tl.sum(count, 0))
    tl.store(finite + row, (tl.max(largest, 0) < INFINITY).to(tl.int8))


@triton.jit
def _keys(
    values, column, width, place, INFINITY: tl.constexpr, SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """What entries of a row are ranked by, and where there are any.

    What fills up a last group counts as zeros, and so does what fills up places to a power of two: it is
    behind all others, and of ties the first are kept.
    """
    inside = (column < width) & (place < SIZE)
    value = tl.load(values + column, mask=inside, other=0)
    # NaN alike, whatever its bits.
    return tl.minimum(_magnitude(value), INFINITY + 1), inside


@triton.jit
def _largest(
    values,
    mask,
    width,
    stride,
    kept,
    INFINITY: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Groups side by side; of each the largest key that enough of it reach is found, bit by bit."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)[None, :]
    for start in range(0, width, SIZE * GROUPS):
        column = start + tl.arange(0, GROUPS)[:, None] * SIZE + place
        key, inside = _keys(values + row * stride, column, width, place, INFINITY, SIZE)
        least = tl.zeros((GROUPS,), tl.int32)
        for bit in tl.static_range(30, -1, -1):
            higher = least | (1 << bit)
            reached = tl.sum((key >= higher[:, None]).to(tl.int32), 1)
            least = tl.where(reached >= kept, higher, least)
        above, alike = key > least[:, None], key == least[:, None]
        left = kept - tl.sum(above.to(tl.int32), 1)
        first = alike & (tl.cumsum(alike.to(tl.int32), 1) <= left[:, None])
        tl.store(mask + row * width + column, (above | first).to(tl.int8), mask=inside)


@triton.jit
def _reaches(some, others):
    """1 in the halves of 16 bits whose number of 15 bits reaches the other's, else 0.

    `some` have their highest bits set, so that no half takes anything from the other.
    """
    return ((some - others) >> 15) & EACH


@triton.jit
def _largest_in_pairs(
    values,
    mask,
    width,
    stride,
    kept,
    INFINITY: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """As `_largest`, of two groups at once, in the halves of a register."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)[None, :]
    kept = kept * EACH
    for start in range(0, width, 2 * SIZE * GROUPS):
        column = start + tl.arange(0, GROUPS)[:, None] * SIZE + place
        other = column + SIZE * GROUPS
        low, inside = _keys(values + row * stride, column, width, place, INFINITY, SIZE)
        high, others = _keys(values + row * stride, other, width, place, INFINITY, SIZE)
        keys = low | (high << 16) | HIGHEST
        least = tl.zeros((GROUPS,), tl.int32)
        for bit in tl.static_range(14, -1, -1):
            reached = tl.sum(_reaches(keys, (least | (EACH << bit))[:, None]), 1)
            least |= _reaches(reached | HIGHEST, kept) << bit
        above = _reaches(keys, (least + EACH)[:, None])
        alike = _reaches(keys, least[:, None]) - above
        left = (kept - tl.sum(above, 1)) | HIGHEST
        chosen = above | (alike & _reaches(left[:, None], tl.cumsum(alike, 1)))
        tl.store(mask + row * width + column, (chosen & 1).to(tl.int8), mask=inside)
        tl.store(mask + row * width + other, (chosen >> 16).to(tl.int8), mask=others)


@triton.jit
def _hash(number):
    number = (number ^ ((number >> 30) & LEFT_30)) * FIRST
    number = (number ^ ((number >> 27) & LEFT_27)) * SECOND
    return number ^ ((number >> 31) & LEFT_31)


@triton.jit
def _codes_of_positive(values, code, inside, INFINITY: tl.constexpr):
    """The codes of positive entries, zeros for others."""
    value = tl.load(values, mask=inside, other=0).to(tl.int32)
    return tl.where((value > 0) & (value <= INFINITY), code, 0)


@triton.jit
def _store_draws(mask, token, code, bound, inside):
    draw = (_hash(token + code) >> 11) & LEFT_11
    tl.store(mask, (draw < bound).to(tl.int8), mask=inside)


@triton.jit
def _draw(
    values,
    mask,
    codes,
    limits,
    rows,
    width,
    stride,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DRAWN_ROWS rows: a code, four times as long as a number of 16 bits, is read once for all of them."""
    row = tl.program_id(0).to(tl.int64) * DRAWN_ROWS
    bound = tl.load(limits)
    values += row * stride
    mask += row * width
    # Of rows that there are.
    width1 = tl.where(row + 1 < rows, width, 0)
    width2 = tl.where(row + 2 < rows, width, 0)
    width3 = tl.where(row + 3 < rows, width, 0)
    sum0, sum1 = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    sum2, sum3 = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        code = tl.load(codes + column, mask=inside, other=0)
        place = values + column
        sum0 += _codes_of_positive(place, code, inside, INFINITY)
        sum1 += _codes_of_positive(place + stride, code, column < width1, INFINITY)
        sum2 += _codes_of_positive(place + 2 * stride, code, column < width2, INFINITY)
        sum3 += _codes_of_positive(place + 3 * stride, code, column < width3, INFINITY)
    token0, token1 = _hash(tl.sum(sum0, 0)), _hash(tl.sum(sum1, 0))
    token2, token3 = _hash(tl.sum(sum2, 0)), _hash(tl.sum(sum3, 0))
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        code = tl.load(codes + column, mask=inside, other=0)
        place = mask + column
        _store_draws(place, token0, code, bound, inside)
        _store_draws(place + width, token1, code, bound, column < width1)
        _store_draws(place + 2 * width, token2, code, bound, column < width2)
        _store_draws(place + 3 * width, token3, code, bound, column < width3)
