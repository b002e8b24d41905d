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

from sparsity_atlas.threshold import LARGEST_EXACT_POWER, mass_bits

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.threshold import Threshold

_KINDS = {"share": 0, "rank": 1, "peak": 2, "fixed": 3}
_SHARE, _RANK, _PEAK, _FIXED = (tl.constexpr(kind) for kind in _KINDS.values())
_INFINITY = tl.constexpr(0x7F800000)  # the bit pattern; NaN lies above
# A float32 sum passes through at most 7 (a group) + 7 (a thread) + 9 (the trees) roundings of 2^-24, and
# a mass through 8.
_ERROR = tl.constexpr(2.0**-19)
_GROUP = tl.constexpr(8)  # entries that lie in one thread, one after another
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
    block = max(_GROUP.value, triton.next_power_of_2(width))
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
        "KIND": _KINDS[kind],
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
def _raised(base, WHOLE: tl.constexpr, FRACTION: tl.constexpr, DIGITS: tl.constexpr):
    """As `threshold.raised`, in the type of `base`; the power is WHOLE + FRACTION / 2^DIGITS."""
    result = tl.full(base.shape, 1.0, base.dtype)
    square = base
    for digit in tl.static_range(10):
        if (WHOLE >> digit) > 0:
            if (WHOLE >> digit) % 2 == 1:
                result = result * square
            square = square * square
    if DIGITS > 0:
        digits = tl.cast(FRACTION, tl.int64)
        root = base
        for digit in range(DIGITS):
            root = tl.sqrt(root)
            taken = (digits >> (DIGITS - 1 - digit)) & 1
            result = tl.where(taken == 1, result * root, result)
    return result


@triton.jit
def _inverse_unit(peak):
    """1 / unit of `threshold.masses`, float64: the exponent of the peak, turned round its middle."""
    largest = peak.to(tl.float32, bitcast=True).to(tl.float64)
    exponent = largest.to(tl.int64, bitcast=True) >> 52
    return ((2045 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _masses(
    score,
    peak,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    DIGITS: tl.constexpr,
    UNIT_IS_PEAK: tl.constexpr,
):
    """(score / unit)^power in float64, as in `threshold.masses`."""
    if UNIT_IS_PEAK:
        base = score.to(tl.float64) / peak.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        base = score.to(tl.float64) * _inverse_unit(peak)
    return _raised(base, WHOLE, FRACTION, DIGITS)


@triton.jit
def _sum(mass, BLOCK: tl.constexpr):
    """A float32 sum with few roundings on any way through it."""
    return tl.sum(tl.sum(tl.reshape(mass, (BLOCK // _GROUP, _GROUP)), 1), 0)


@triton.jit
def _load(
    values,
    weights,
    row,
    width,
    stride,
    HALF: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's scores, their bit patterns, and the largest of these."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    # To be kept in the cache until it is written; the other policy there also stops the compiler from
    # taking both loads for one, and the row back into registers.
    value = tl.load(
        values + row * stride + column, mask=inside, other=0, eviction_policy="evict_last"
    )
    if value.dtype == tl.int32:
        score = (value & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    elif HALF:
        score = (value & 0x7FFF).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        score = ((value.to(tl.int32) & 0x7FFF) << 16).to(tl.float32, bitcast=True)
    if WEIGHTED:
        score = score * tl.load(weights + column, mask=inside, other=0.0)
    key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return score, key, tl.max(key, 0)


@triton.jit
def _write(
    values,
    onto,
    out,
    zeros,
    row,
    width,
    values_stride,
    onto_stride,
    kept,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store what is kept, and how many zeros that leaves.

    The row is read again: it is still in the cache, and registers that hold it through the search
    would be missing to other rows.
    """
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(
        values + row * values_stride + column,
        mask=inside,
        other=0,
        eviction_policy="evict_first",
    )
    written = value if SAME else tl.load(onto + row * onto_stride + column, mask=inside, other=0)
    tl.store(out + row * width + column, tl.where(kept, written, 0).to(written.dtype), mask=inside)
    magnitude: tl.constexpr = 0x7FFFFFFF if value.dtype == tl.int32 else 0x7FFF
    alive = kept & ((value & magnitude) != 0)
    tl.store(zeros + row, width - tl.sum(alive.to(tl.int32), 0))


@triton.jit
def _search(
    score,
    key,
    peak,
    numbers,
    width,
    rank,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    DIGITS: tl.constexpr,
    UNIT_IS_PEAK: tl.constexpr,
    MASS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The bit pattern of the row's threshold, and whether it is sure.

    Regula falsi (Illinois) between `low`, at which the target is held, and `high`, at which it is not:
    bit patterns without their SHIFT empty bits. With EXACT, or counting (KIND is _RANK), all is sure.
    """
    amount = tl.load(numbers)
    # Sums stay in range, whatever the size of the scores.
    up = peak < 0x2B800000  # 2^-40
    down = peak >= 0x5F800000  # 2^64
    scale = tl.where(up, 2.0**104, tl.where(down, 2.0**-64, 1.0))
    back = tl.where(up, 2.0**-104, tl.where(down, 2.0**64, 1.0))
    if not EXACT:
        # No second copy of the row in registers: rows out of range are left to be settled.
        scale, back = 1.0, 1.0
    mass = score * scale
    mean = _sum(mass, BLOCK) / width
    middle = (mean * tl.load(numbers + 1).to(tl.float32) * back).to(tl.int32, bitcast=True) >> SHIFT
    low = (mean * tl.load(numbers + 2).to(tl.float32) * back).to(tl.int32, bitcast=True) >> SHIFT
    # A mean that overflows says nothing, and its NaN has the bits of a large number.
    low = tl.where(mean < float("inf"), tl.minimum(low, peak >> SHIFT), 0)
    high = (peak >> SHIFT) + 1
    sure = 1
    if KIND == _RANK:
        total = width.to(tl.float32)
        target = rank.to(tl.float32)
    else:
        if not EXACT:
            sure = tl.where((up | down) & (peak > 0), 0, 1)
            high = tl.where(sure == 1, high, low)
        if WHOLE > 1 or DIGITS > 0:
            if UNIT_IS_PEAK or DIGITS > 0:
                mass = _masses(score, peak, WHOLE, FRACTION, DIGITS, UNIT_IS_PEAK).to(tl.float32)
            else:
                unit = (_inverse_unit(peak) * tl.cast(back, tl.float64)).to(tl.float32)
                mass = _raised(mass * unit, WHOLE, FRACTION, DIGITS)
        total = _sum(mass, BLOCK)
        target = total * amount.to(tl.float32)
        if EXACT:
            whole = _masses(score, peak, WHOLE, FRACTION, DIGITS, UNIT_IS_PEAK)
            whole = (whole * (2.0**MASS_BITS)).to(tl.int64)
            all_of_it = tl.sum(whole, 0)
            exact = all_of_it.to(tl.float64) * amount
            wanted = exact.to(tl.int64)
            wanted += (wanted.to(tl.float64) < exact).to(tl.int64)
            wanted = tl.minimum(tl.maximum(wanted, 1), all_of_it)
    above = total - target
    below = -target
    side = 0
    tries = 0
    step = (1 << 24) >> SHIFT  # two binades
    while high - low > 1:
        if tries > 0:
            if low == 0:
                middle = high - step
                step = tl.minimum(step * 2, 1 << 29)
            elif (tries > 12) & (tries % 2 == 0):
                middle = low + (high - low) // 2
            else:
                spread = above - below
                ratio = tl.where(spread > 0, above / spread, 0.5)
                middle = low + ((high - low).to(tl.float32) * ratio).to(tl.int32)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        reaches = key >= (middle << SHIFT)
        if KIND == _RANK:
            count = tl.sum(reaches.to(tl.int32), 0)
            found = count.to(tl.float32)
            enough = count >= rank
        else:
            found = _sum(tl.where(reaches, mass, 0.0), BLOCK)
            enough = found >= target
            if EXACT:
                enough = tl.sum(tl.where(reaches, whole, 0), 0) >= wanted
            else:
                sure = tl.where(tl.abs(found - target) < _ERROR * (found + target), 0, 1)
        # An end that stays twice counts half.
        rest = found - target
        below = tl.where(enough, tl.where(side == 1, below * 0.5, below), tl.minimum(rest, 0.0))
        above = tl.where(enough, tl.maximum(rest, 0.0), tl.where(side == -1, above * 0.5, above))
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        side = tl.where(enough, 1, -1)
        tries += 1
        if SHIFT == 0:
            # Between two patterns that occur there is nothing to search.
            low = tl.min(tl.where(key >= low, key, high), 0)
            high = tl.max(tl.where(key < high, key, low), 0) + 1
        high = tl.where(sure == 1, high, low)
    return low << SHIFT, sure


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
    score, key, peak = _load(values, weights, row, width, values_stride, HALF, WEIGHTED, BLOCK)
    whole = peak < _INFINITY
    peak = tl.where(whole, peak, 0)
    sure = 1
    if KIND == _FIXED:
        if BY_CHANNEL:
            column = tl.arange(0, BLOCK)
            cut = tl.load(constants + column, mask=column < width, other=0.0)
        else:
            cut = tl.load(constants)
        kept = (key >= cut.to(tl.int32, bitcast=True)) | (whole == 0)
    elif KIND == _PEAK:
        exact = peak.to(tl.float32, bitcast=True).to(tl.float64) * tl.load(numbers)
        nearest = exact.to(tl.float32)
        least = nearest.to(tl.int32, bitcast=True)
        least += (nearest.to(tl.float64) < exact).to(tl.int32)
        kept = key >= least
    else:
        least, sure = _search(
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
    _write(values, onto, out, zeros, row, width, values_stride, onto_stride, kept, SAME, BLOCK)
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
            score, key, peak = _load(
                values, weights, row, width, values_stride, HALF, WEIGHTED, BLOCK
            )
            least, _ = _search(
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
            _write(
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
