"""Zeros of several tensors on CUDA, in Triton: one launch, which writes nothing but the counts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
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
# Triton's own way to what it compiled takes longer than the rest of a launch.
_COMPILED: dict[tuple[object, ...], CompiledKernel | None] = {}


def count(tensors: Sequence[Tensor], places: Sequence[int], zeros: Tensor, finite: Tensor) -> None:
    """As `kernels.count_together`, for tensors [rows, width] of one type on one device, as many rows each."""
    rows, device, dtype = len(tensors[0]), tensors[0].device, tensors[0].dtype
    if rows == 0:
        return
    tensors = [one if one.stride(-1) == 1 else one.contiguous() for one in tensors]
    table = [
        (one.data_ptr(), one.shape[-1], one.stride(0), place)
        for one, place in zip(tensors, places, strict=True)
    ]
    entries = np.array(table, np.int64)
    size = tensors[0].element_size()
    aligned = not any((at | wide * size | apart * size) % ALIGNMENT for at, wide, apart, _ in table)
    sent = torch.from_numpy(entries)
    if device.type == "cuda":
        # Pinned, the copy takes its turn on the device like any other work.
        sent = sent.pin_memory().to(device, non_blocking=True)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(max(wide for _, wide, _, _ in table)))
    constants = {"WIDE": size == 4, "INFINITY": INFINITIES[dtype]}
    constants |= {"ALIGNED": aligned, "BLOCK": block}
    arguments = sent, zeros, finite.view(torch.int8), rows
    key = (device, *constants.values())
    compiled = _COMPILED.get(key)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if compiled is None:
            _COMPILED[key] = _count[(rows, len(table))](*arguments, **constants, num_warps=WARPS)
        else:
            compiled[(rows, len(table), 1)](*arguments, *constants.values())


@triton.jit(do_not_specialize=["rows"])
def _count(
    table,
    zeros,
    finite,
    rows,
    WIDE: tl.constexpr,
    INFINITY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count one row of one tensor."""
    row = tl.program_id(0).to(tl.int64)
    entry = table + 4 * tl.program_id(1)
    address, width = tl.load(entry), tl.load(entry + 1)
    stride, place = tl.load(entry + 2), tl.load(entry + 3)
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
    count, largest = 0, 0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(values + column, mask=column < width, other=1).to(tl.int32)
        size = value & (0x7FFFFFFF if WIDE else 0x7FFF)
        count += tl.sum((size == 0).to(tl.int32), 0)
        largest = tl.maximum(largest, tl.max(size, 0))
    at = place * rows + row
    tl.store(zeros + at, count)
    tl.store(finite + at, (largest < INFINITY).to(tl.int8))
