"""Thresholds on CUDA, in Triton: a row stays in registers, one read and one write, nothing waits.

A row's threshold is found on the bit patterns of its scores, which sort like integers (15 bits of them
for bfloat16 and float16, 31 for float32), by regula falsi over float32 sums. A row in which a comparison
lies within the sums' error is left to a second kernel, which adds the integer masses of the definition:
it needs many registers, which would slow down all the other rows. So the masks are those of
`Threshold.mask`, bit for bit. Zeros and broken rows are left on the device, one number a row.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparsity_atlas.kernels.cuda_row import (
    FIXED,
    GROUP,
    INFINITY,
    KINDS,
    PEAK,
    load_row,
    search_row,
    write_row,
)
from sparsity_atlas.threshold import LARGEST_EXACT_POWER, mass_bits

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.threshold import Threshold

# Low bits that a type leaves empty in float32.
_EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
ENTRIES_A_THREAD = 32
# Of a thread; a row's scores take one an entry. More leave room for fewer rows at a time.
REGISTERS = 48
_UNSURE = tl.constexpr(-1)
_ROWS_TO_SETTLE = 8  # that one program looks through


def masked(rule: Threshold, values: Tensor, onto: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.masked`, for tensors [rows, width] on one CUDA device."""
    rows, width = values.shape
    same = onto.data_ptr() == values.data_ptr() and onto.stride() == values.stride()
    values, onto = (one if one.stride(-1) == 1 else one.contiguous() for one in (values, onto))
    out = torch.empty((rows, width), dtype=onto.dtype, device=onto.device)
    zeros = torch.empty(rows, dtype=torch.int32, device=values.device)
    finite = torch.empty(rows, dtype=torch.int8, device=values.device)
    if rows == 0:
        return out, zeros, finite.view(torch.bool)
    block = max(GROUP.value, triton.next_power_of_2(width))
    kind, constants = rule.kind, rule.constants
    if kind == "share" and rule.amount >= 1:
        kind, constants = "fixed", _constant(0.0, values.device)
    elif kind == "rank" and rule.amount == 0:
        kind, constants = "fixed", _constant(math.inf, values.device)
    arguments = (
        *(_bits(one) for one in (values, onto, out)),
        zeros,
        finite,
        zeros if rule.weights is None else rule.weights,
        zeros if constants is None else constants,
        _numbers(rule, width, values.device),
        rows,
        width,
        values.stride(0),
        onto.stride(0),
        int(rule.amount) if kind == "rank" else 0,
    )
    options = {
        **_variant(rule, kind, values.dtype, width),
        "SAME": same,
        "BLOCK": block,
        "num_warps": warps(block),
    }
    # Of `_settle` a few programs do the work.
    registers = {"maxnreg": REGISTERS}
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        _mask[(rows,)](*arguments, **options, **registers)
        if kind == "share":
            _settle[(triton.cdiv(rows, _ROWS_TO_SETTLE),)](
                *arguments, **options, ROWS=_ROWS_TO_SETTLE
            )
    return out, zeros, finite.view(torch.bool)


def warps(block: int) -> int:
    """Warps a row."""
    return min(32, max(1, block // (32 * ENTRIES_A_THREAD)))


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as signed integers of its size."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def _variant(rule: Threshold, kind: str, dtype: torch.dtype, width: int) -> dict[str, int | bool]:
    """What is compiled in."""
    fraction, digits = rule.power - int(rule.power), 0
    while fraction != int(fraction):
        fraction *= 2
        digits += 1
    return {
        "KIND": KINDS[kind],
        "HALF": dtype == torch.float16,
        "SHIFT": _EMPTY_BITS[dtype] if rule.weights is None else 0,
        "WEIGHTED": rule.weights is not None,
        "BY_CHANNEL": rule.constants is not None and len(rule.constants) > 1,
        "WHOLE": int(rule.power),
        "FRACTION": int(fraction),
        "DIGITS": digits,
        "UNIT_IS_PEAK": rule.power > LARGEST_EXACT_POWER,
        "MASS_BITS": mass_bits(width),
    }


@functools.cache
def _constant(number: float, device: torch.device) -> Tensor:
    return torch.tensor([number], dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=1024)
def _numbers(rule: Threshold, width: int, device: torch.device) -> Tensor:
    """float64 [3] on the device: the amount, and over the mean score a first guess and a lower bound."""
    guess, low = 1.0, 0.0
    if rule.kind == "rank" and rule.amount > 0:
        # As if magnitudes fell off exponentially; a bad guess costs a few passes.
        guess = math.log(width / rule.amount)
    if rule.kind == "share":
        rest = max(1 - rule.amount, 0.0)
        guess = 2 * rest ** (0.6 / rule.power)
        if rule.power == 1 and rest > 2.0**-10:
            # All that lies below a score s weighs less than width · s: surely low enough.
            low = 0.99 * rest
    return torch.tensor([rule.amount, guess, low], dtype=torch.float64, device=device)


@triton.jit
def _mask(
    values,
    onto,
    out,
    zeros,
    finite,
    weights,
    constants,
    numbers,
    rows,
    width,
    values_stride,
    onto_stride,
    rank,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    DIGITS: tl.constexpr,
    UNIT_IS_PEAK: tl.constexpr,
    MASS_BITS: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mask one row; where its threshold is not sure, leave _UNSURE in place of its zeros."""
    row = tl.program_id(0).to(tl.int64)
    score, key, peak = load_row(values, weights, row, width, values_stride, HALF, WEIGHTED, BLOCK)
    whole = peak < INFINITY
    peak = tl.where(whole, peak, 0)
    sure = 1
    if KIND == FIXED:
        if BY_CHANNEL:
            column = tl.arange(0, BLOCK)
            cut = tl.load(constants + column, mask=column < width, other=0.0)
        else:
            cut = tl.load(constants)
        kept = (key >= cut.to(tl.int32, bitcast=True)) | (whole == 0)
    elif KIND == PEAK:
        exact = peak.to(tl.float32, bitcast=True).to(tl.float64) * tl.load(numbers)
        nearest = exact.to(tl.float32)
        least = nearest.to(tl.int32, bitcast=True)
        least += (nearest.to(tl.float64) < exact).to(tl.int32)
        kept = key >= least
    else:
        least, sure = search_row(
            score,
            key,
            peak,
            numbers,
            width,
            rank,
            KIND,
            SHIFT,
            WHOLE,
            FRACTION,
            DIGITS,
            UNIT_IS_PEAK,
            MASS_BITS,
            BLOCK,
            False,
        )
        kept = key >= least
    write_row(values, onto, out, zeros, row, width, values_stride, onto_stride, kept, SAME, BLOCK)
    if sure == 0:
        tl.store(zeros + row, _UNSURE)
    tl.store(finite + row, whole.to(tl.int8))


@triton.jit
def _settle(
    values,
    onto,
    out,
    zeros,
    finite,
    weights,
    constants,
    numbers,
    rows,
    width,
    values_stride,
    onto_stride,
    rank,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    DIGITS: tl.constexpr,
    UNIT_IS_PEAK: tl.constexpr,
    MASS_BITS: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mask those of ROWS rows that `_mask` left."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    for offset in range(ROWS):
        row = first + offset
        if tl.load(zeros + row, mask=row < rows, other=0) == _UNSURE:
            score, key, peak = load_row(
                values, weights, row, width, values_stride, HALF, WEIGHTED, BLOCK
            )
            least, _ = search_row(
                score,
                key,
                peak,
                numbers,
                width,
                rank,
                KIND,
                SHIFT,
                WHOLE,
                FRACTION,
                DIGITS,
                UNIT_IS_PEAK,
                MASS_BITS,
                BLOCK,
                True,
            )
            write_row(
                values,
                onto,
                out,
                zeros,
                row,
                width,
                values_stride,
                onto_stride,
                key >= least,
                SAME,
                BLOCK,
            )
