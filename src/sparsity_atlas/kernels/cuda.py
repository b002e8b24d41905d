"""Thresholds on CUDA, in Triton: a row's scores stay in registers, one launch, nothing waits.

A row's threshold is found on the bit patterns of its scores, which sort like integers (15 bits of them
for bfloat16 and float16, 31 for float32), by a few float32 sums. A row in which a comparison lies within
their error is searched once more with the integer masses of the definition. So the masks are those of
`Threshold.mask`, bit for bit. Zeros and broken rows are left on the device, one number a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from sparsity_atlas.kernels import cuda_share, nvrtc
from sparsity_atlas.kernels.cuda_row import (
    FIXED,
    GROUP,
    INFINITY,
    KINDS,
    PEAK,
    RANK,
    load_row,
    search_row,
    write_row,
)
from sparsity_atlas.kernels.definition import (
    LARGEST_EXACT_POWER,
    LIMBS,
    limbs,
    mass_bits,
    not_above,
)

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    _CHAINS = False
else:
    _CHAINS = True

if TYPE_CHECKING:
    from torch import Tensor
    from triton.compiler import CompiledKernel

    from sparsity_atlas.kernels.definition import Threshold

# Low bits that a type leaves empty in float32.
_EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
# Entries a thread. Many make sums within a thread of sums between threads, but fill few rows' threads.
ENTRIES, WIDE, WIDE_ENTRIES = 32, 16384, 64
_REGISTERS_AN_ENTRY = 2  # one holds its score
# Rows of a step of decoding, which waits for them.
_FEW_ROWS = 16
_MANY_REGISTERS = 255  # for masses in float64 and for weights, which take as many again
_REGISTERS = 65536  # of a processor


def masked(
    rule: Threshold, values: Tensor, onto: Tensor, ranks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.masked`, for tensors [rows, width] on one CUDA device.

    Args:
        rule: with its tensors there.
        values: what it looks at.
        onto: what is masked.
        ranks: int32 [rows]: of a rule of kind `rank` the amount for each row, in place of its own, from which
            the search begins.
    """
    rows, width = values.shape
    if rows > _FEW_ROWS and nvrtc.is_there(values.device):
        found = _share(rule, values, onto)
        if found is not None:
            return found
    same = onto.data_ptr() == values.data_ptr() and onto.stride() == values.stride()
    values, onto = (one if one.stride(-1) == 1 else one.contiguous() for one in (values, onto))
    out = torch.empty((rows, width), dtype=onto.dtype, device=onto.device)
    zeros = torch.empty(rows, dtype=torch.int32, device=values.device)
    finite = torch.empty(rows, dtype=torch.bool, device=values.device)
    if rows == 0:
        return out, zeros, finite
    few = rows <= _FEW_ROWS
    plan = _plan(rule, width, values.dtype, values.device, same, few, ranks is not None)
    arguments = (
        *(bits_of(one) for one in (values, onto, out)),
        zeros,
        finite.view(torch.int8),
        *plan.tensors,
        plan.rank if ranks is None else ranks,
        width,
        values.stride(0),
        onto.stride(0),
    )
    # All else that Triton compiles for is the plan's, or fresh and so aligned.
    key = values.data_ptr() % 16, onto.data_ptr() % 16, values.stride(0), onto.stride(0)
    compiled = plan.compiled.get(key)
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        if compiled is None:
            plan.compiled[key] = _mask[(rows,)](*arguments, **plan.options)
        else:
            compiled[(rows, 1, 1)](*arguments, *plan.constants)
    return out, zeros, finite


def _share(rule: Threshold, values: Tensor, onto: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `masked` returns, by `cuda_share`; None where that is not made for it."""
    rows, width = values.shape
    cut = cuda_share.cut_of(rule, width, values.dtype)
    if cut is None or not all(map(cuda_share.is_aligned, (values, onto))):
        return None
    weights = rule.weights
    if weights is not None and not cuda_share.is_aligned(weights[None]):
        return None
    out = torch.empty((rows, width), dtype=onto.dtype, device=onto.device)
    zeros = torch.empty(rows, dtype=torch.int32, device=values.device)
    finite = torch.empty(rows, dtype=torch.bool, device=values.device)
    plan = _plan(rule, width, values.dtype, values.device, True, False, False)
    numbers = plan.tensors[-1]
    cuda_share.masked(values, onto, out, zeros, finite, weights, numbers, cut)
    return out, zeros, finite


class _Plan(NamedTuple):
    """What a launch needs of a rule for rows of one kind.

    Attributes:
        tensors: weights, constants and numbers, on the device; where there are none, any.
        rank: int32 [1] on the device, of kind `rank`; of others any.
        options: what is compiled in, and how it is launched.
        constants: what is compiled in, in the order of the kernel's arguments.
        compiled: by alignment and strides of the rows; Triton's own way to what it compiled takes longer
            than the rest of a launch. None where it interprets.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    rank: Tensor
    options: dict[str, int | bool]
    constants: tuple[int | bool, ...]
    compiled: dict[tuple[int, ...], CompiledKernel | None]


# Made once: a forward pass over few tokens waits for its host. Kept for as long as their rules: a recorded
# step goes on reading their tensors.
_PLANS: WeakKeyDictionary[Threshold, dict[Hashable, _Plan]] = WeakKeyDictionary()


def _plan(
    rule: Threshold,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    same: bool,
    few: bool,
    by_row: bool,
) -> _Plan:
    """What is launched for a rule."""
    known, key = _PLANS.setdefault(rule, {}), (width, dtype, device, same, few, by_row)
    if key not in known:
        known[key] = _planned(rule, *key)
    return known[key]


def _planned(
    rule: Threshold,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    same: bool,
    few: bool,
    by_row: bool,
) -> _Plan:
    kind, constants = rule.kind, rule.constants
    if kind == "share" and rule.amount >= 1:
        kind, constants = "fixed", torch.tensor([0.0], device=device)
    elif kind == "rank" and rule.amount == 0:
        kind, constants = "fixed", torch.tensor([math.inf], device=device)
    numbers = numbers_of(rule, width, device)
    weights = numbers if rule.weights is None else rule.weights
    bounds = numbers if constants is None else constants
    block = max(GROUP.value, triton.next_power_of_2(width))
    variant = variant_of(rule, kind, dtype, width)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    chained = few and hopper and _CHAINS
    options = variant | {"BY_ROW": by_row, "SAME": same, "BLOCK": block, "CHAINED": chained}
    compiled_in = tuple(options[name] for name in _mask.arg_names if name in options)
    many = variant["WEIGHTED"] or variant["DIGITS"] or variant["UNIT_IS_PEAK"]
    warps, registers = launch(block, many=bool(many), few=few)
    options |= {"num_warps": warps, "maxnreg": registers}
    if chained:
        options["launch_pdl"] = True
    rank = torch.tensor([rule.amount if kind == "rank" else 0], dtype=torch.int32, device=device)
    return _Plan((weights, bounds, numbers), rank, options, compiled_in, {})


def launch(block: int, *, many: bool, few: bool = False) -> tuple[int, int]:
    """Warps a row, and registers a thread, for (few) rows of up to `block` entries."""
    entries = WIDE_ENTRIES if block >= WIDE and not few else ENTRIES
    warps = min(32, max(1, block // (32 * entries)))
    registers = _MANY_REGISTERS if many else _REGISTERS_AN_ENTRY * entries
    return warps, min(registers, _REGISTERS // (32 * warps))


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's memory as signed integers of its size."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def variant_of(rule: Threshold, kind: str, dtype: torch.dtype, width: int) -> dict[str, int | bool]:
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


def numbers_of(rule: Threshold, width: int, device: torch.device) -> Tensor:
    """float64 [4 + LIMBS] on the device: the amount; over the mean score a first guess and a lower bound; one
    over the power of a threshold that the mass below it is taken for at first; and the amount's limbs."""
    low = 0.0
    guess, run = cuda_share.first_guess(rule)
    if rule.kind == "rank" and rule.amount > 0:
        # As if magnitudes fell off exponentially; a bad guess costs a few passes.
        guess = math.log(width / rule.amount)
    if rule.kind == "share":
        rest = max(1 - rule.amount, 0.0)
        if rule.power == 1 and rest > 2.0**-10:
            # All that lies below a score s weighs less than width · s: surely low enough.
            low = 0.99 * rest
    amount = not_above(rule.amount) if rule.kind == "peak" else rule.amount
    exact = limbs(amount) if rule.kind == "share" and amount < 1 else [0] * LIMBS
    return torch.tensor([amount, guess, low, run, *exact], dtype=torch.float64, device=device)


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
    ranks,
    width,
    values_stride,
    onto_stride,
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
    BY_ROW: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Mask one row."""
    if CHAINED:
        # The next launch may take its place already; this one waits for what the last one wrote.
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    score, peak = load_row(values, weights, row, width, values_stride, HALF, WEIGHTED, BLOCK)
    whole = peak < INFINITY
    peak = tl.where(whole, peak, 0)
    if KIND == FIXED:
        if BY_CHANNEL:
            column = tl.arange(0, BLOCK)
            cut = tl.load(constants + column, mask=column < width, other=0.0)
        else:
            cut = tl.load(constants)
        least = tl.where(whole, cut.to(tl.int32, bitcast=True), 0)
    elif KIND == PEAK:
        exact = peak.to(tl.float32, bitcast=True).to(tl.float64) * tl.load(numbers)
        nearest = exact.to(tl.float32)
        least = nearest.to(tl.int32, bitcast=True)
        least += (nearest.to(tl.float64) < exact).to(tl.int32)
    else:
        least, sure, rank = peak, 0, 0
        if KIND == RANK:
            rank = tl.load(ranks + row if BY_ROW else ranks)
        # By float32 sums, and where these leave it open, exactly. That takes more registers than there
        # are, so that such rows, and only they, wait for memory.
        for exact in tl.static_range(2):
            if sure == 0:
                least, sure = search_row(
                    score,
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
                    exact == 1,
                )
        if BY_ROW:
            least = tl.where(whole & (rank == 0), INFINITY, least)
    write_row(
        values,
        onto,
        out,
        zeros,
        row,
        width,
        values_stride,
        onto_stride,
        score,
        least,
        WEIGHTED,
        SAME,
        BLOCK,
    )
    tl.store(finite + row, whole.to(tl.int8))
