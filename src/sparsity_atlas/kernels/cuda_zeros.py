"""Zeros of several tensors on CUDA, in Triton: one launch, which writes nothing but the counts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparsity_atlas.kernels.definition import INFINITIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from triton.compiler import CompiledKernel

LARGEST_BLOCK = 2048
WARPS = 4
ALIGNMENT = 16  # bytes
AT_ONCE = 4  # of a part and its attention no more are counted
# Triton's own way to what it compiled takes longer than the rest of a launch.
_COMPILED: dict[tuple[object, ...], CompiledKernel | None] = {}


def count(tensors: Sequence[Tensor], places: Sequence[int], zeros: Tensor, finite: Tensor) -> None:
    """As `kernels.count_together`, for tensors [rows, width] of one type on one device, as many rows each."""
    for start in range(0, len(tensors), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        _launch(tensors[some], places[some], zeros, finite)


def _launch(
    tensors: Sequence[Tensor], places: Sequence[int], zeros: Tensor, finite: Tensor
) -> None:
    """Count up to `AT_ONCE` of them. All that the kernel is told of them it is told by value, since a table
    in memory could not be recorded with a step."""
    rows, device, dtype = len(tensors[0]), tensors[0].device, tensors[0].dtype
    if rows == 0:
        return
    tensors = [one if one.stride(-1) == 1 else one.contiguous() for one in tensors]
    told = [
        (one.data_ptr(), one.shape[-1], one.stride(0), place)
        for one, place in zip(tensors, places, strict=True)
    ]
    size = tensors[0].element_size()
    aligned = not any((at | wide * size | apart * size) % ALIGNMENT for at, wide, apart, _ in told)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(max(wide for _, wide, _, _ in told)))
    constants = {"WIDE": size == 4, "INFINITY": INFINITIES[dtype]}
    constants |= {"ALIGNED": aligned, "BLOCK": block}
    # Nothing runs for those that are not there.
    told += told[:1] * (AT_ONCE - len(told))
    by_kind = (one for kind in zip(*told, strict=True) for one in kind)
    arguments = zeros, finite.view(torch.int8), rows, *by_kind
    key = (device, *constants.values())
    compiled = _COMPILED.get(key)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if compiled is None:
            _COMPILED[key] = _count[(rows, len(tensors))](*arguments, **constants, num_warps=WARPS)
        else:
            compiled[(rows, len(tensors), 1)](*arguments, *constants.values())


@triton.jit
def _of(which, n0, n1, n2, n3):
    """One of some numbers."""
    return tl.where(which < 2, tl.where(which == 0, n0, n1), tl.where(which == 2, n2, n3))


TOLD = [f"{kind}{number}" for kind in "awsp" for number in range(AT_ONCE)]


@triton.jit(do_not_specialize=["rows", *TOLD])
def _count(
    zeros,
    finite,
    rows,
    # Addresses, widths, strides and places of `AT_ONCE` tensors.
    a0,
    a1,
    a2,
    a3,
    w0,
    w1,
    w2,
    w3,
    s0,
    s1,
    s2,
    s3,
    p0,
    p1,
    p2,
    p3,
    WIDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count one row of one tensor."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    address = _of(which, a0, a1, a2, a3)
    width = _of(which, w0, w1, w2, w3)
    stride = _of(which, s0, s1, s2, s3)
    place = _of(which, p0, p1, p2, p3)
    if ALIGNED:
        # Said to the compiler, which then reads several entries at once.
        width, stride = tl.multiple_of(width, 4), tl.multiple_of(stride, 4)
        address = tl.multiple_of(address, 16)
    if WIDE:
        values = address.to(tl.pointer_type(tl.int32))
    else:
        values = address.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            width, stride = tl.multiple_of(width, 8), tl.multiple_of(stride, 8)
    values += row * stride
    # Added up over threads at the end.
    count, largest = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(values + column, mask=column < width, other=1).to(tl.int32)
        size = value & (0x7FFFFFFF if WIDE else 0x7FFF)
        count += (size == 0).to(tl.int32)
        largest = tl.maximum(largest, size)
    at = place * rows + row
    tl.store(zeros + at, tl.sum(count, 0))
    tl.store(finite + at, (tl.max(largest, 0) < INFINITY).to(tl.int8))
