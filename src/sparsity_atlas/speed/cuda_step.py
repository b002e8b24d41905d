"""What one token goes through between the products, in Triton: residual and norm, attention; a launch each.

Numbers are rounded where torch rounds them; attention itself adds up in float32. Sums have a fixed order, as
those of `decoding.cuda_entries` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsity_atlas.decoding.cuda_products import chained, on, room_of

if TYPE_CHECKING:
    from torch import Tensor

# Places of a ring that a program looks at at once, programs that there should be, and warps of each.
_PLACES, _PROGRAMS, _WARPS = 32, 528, 2


def normed(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more, and that over the root of its mean square (RMSNorm).

    Args:
        x: [rows, width].
        more: of the same shape; None: nothing.
        weight: [width], that a norm is multiplied by.
        eps: beside the mean square.

    Returns:
        The sum and its norm, [rows, width] each.
    """
    x = x.contiguous()
    rows, width = x.shape
    total = x if more is None else torch.empty_like(x)
    out = torch.empty_like(x)
    with on(x.device):
        _normed[(rows,)](
            *(x, x if more is None else more.contiguous(), weight, total, out, width, eps),
            MORE=more is not None,
            BLOCK=triton.next_power_of_2(width),
            CHAINED=chained(x.device),
            num_warps=8,
            launch_pdl=chained(x.device),
        )
    return total, out


@triton.jit
def _normed(
    x,
    more,
    weight,
    total,
    out,
    width,
    eps,
    MORE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    n = tl.arange(0, BLOCK)
    there = n < width
    scale = tl.load(weight + n, mask=there, other=0.0).to(tl.float32)
    if CHAINED:
        # The next launch may take its place already; this one waits for what the last one wrote.
        gdc_launch_dependents()
        gdc_wait()
    kind = out.dtype.element_ty
    cell = tl.program_id(0).to(tl.int64) * width + n
    value = tl.load(x + cell, mask=there, other=0.0).to(tl.float32)
    if MORE:
        value = (value + tl.load(more + cell, mask=there, other=0.0).to(tl.float32)).to(kind)
        tl.store(total + cell, value, mask=there)
        value = value.to(tl.float32)
    mean = tl.sum(value * value, 0) / width
    unit = (value * tl.rsqrt(mean + eps)).to(kind).to(tl.float32)
    tl.store(out + cell, (unit * scale).to(kind), mask=there)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turns: tuple[Tensor, Tensor],
    mask: Tensor,
    ring: tuple[Tensor, Tensor],
    clock: Tensor,
    scale: float,
) -> Tensor:
    """Attention of one token of each row over a ring, which its key and value are put into.

    Args:
        query: [rows, heads * width], before the rotary embedding; each row in one stretch.
        key: [rows, groups * width], likewise; heads share those of their group.
        value: likewise.
        turns: cosines and sines, [rows, 1, width] each, of halves that turn against each other.
        mask: [rows, 1, 1, size], added to the scores. On a GPU mask, turns and clock are of launches whose
            ends another one has waited for, before the one that makes the vectors.
        ring: keys and values [rows, groups, size, width].
        clock: int64 [1], the place in the ring of what comes in.
        scale: of scores.

    Returns:
        [rows, heads * width].
    """
    keys, values = ring
    rows, groups, size, width = keys.shape
    heads = query.shape[1] // width
    # A copy of these would be the last launch, for which a kernel that begins ahead of its end does not wait.
    ahead = chained(query.device) and all(one.is_contiguous() for one in (*turns, mask))
    cosines, sines = (one.contiguous() for one in turns)
    out = torch.empty((rows, heads * width), dtype=query.dtype, device=query.device)
    split = min(triton.cdiv(size, _PLACES), max(1, _PROGRAMS // (rows * heads)))
    places = triton.cdiv(triton.cdiv(size, split), _PLACES) * _PLACES
    split = triton.cdiv(size, places)
    partial, arrived, _ = room_of(query.device).of(
        rows * heads * split * (width + 2), rows * heads, 0
    )
    with on(query.device):
        _attended[(rows * heads, split)](
            *(query, key, value, cosines, sines, mask.contiguous(), keys, values, clock, out),
            *(partial, arrived, query.stride(0), key.stride(0), value.stride(0)),
            *(heads, groups, size, places, width, scale),
            SPLIT=split,
            WIDTH=triton.next_power_of_2(width),
            PLACES=_PLACES,
            CHAINED=ahead,
            num_warps=_WARPS,
            launch_pdl=ahead,
        )
    return out


@triton.jit
def _attended(
    query,
    key,
    value,
    cosines,
    sines,
    mask,
    keys,
    values,
    clock,
    out,
    partial,
    arrived,
    query_step,
    key_step,
    value_step,
    heads,
    groups,
    size,
    places,
    width,
    scale,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    kind = out.dtype.element_ty
    which, split = tl.program_id(0), tl.program_id(1)
    row, head = which // heads, which % heads
    group = head // (heads // groups)
    d = tl.arange(0, WIDTH)
    there = d < width
    low = split * places
    high = tl.minimum(low + places, size)
    ring = (row * groups + group).to(tl.int64) * size * width
    place = low + tl.arange(0, PLACES)
    cell = ring + place[:, None] * width + d[None, :]
    known = (place < high)[:, None] & there[None, :]
    # What earlier steps left, and what this one began with, is there before the launch that makes the vectors
    # has begun: a launch that waits for the ends of all others lies between (see `joined`).
    k = tl.load(keys + cell, mask=known, other=0.0)
    v = tl.load(values + cell, mask=known, other=0.0)
    hidden = tl.load(mask + row * size + place, mask=place < high, other=0.0)
    at = tl.load(clock).to(tl.int32)
    half = width // 2
    other = tl.where(d < half, d + half, d - half)
    cosine = tl.load(cosines + row * width + d, mask=there, other=0.0).to(tl.float32)
    sine = tl.load(sines + row * width + d, mask=there, other=0.0).to(tl.float32)
    sine = tl.where(d < half, -sine, sine)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    q = _turned(query + row * query_step + head * width, d, other, there, cosine, sine, kind)
    new = _turned(key + row * key_step + group * width, d, other, there, cosine, sine, kind)
    made = tl.load(value + row * value_step + group * width + d, mask=there, other=0.0)
    made = made.to(tl.float32)
    lowest = -3.0e38
    peak = tl.full((), lowest, tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    peak, total, sums = _looked_at(
        *(k, v, q, new, made, place, at, high, hidden, scale, lowest, peak, total, sums)
    )
    for first in range(low + PLACES, high, PLACES):
        place = first + tl.arange(0, PLACES)
        cell = ring + place[:, None] * width + d[None, :]
        known = (place < high)[:, None] & there[None, :]
        k = tl.load(keys + cell, mask=known, other=0.0)
        v = tl.load(values + cell, mask=known, other=0.0)
        hidden = tl.load(mask + row * size + place, mask=place < high, other=0.0)
        peak, total, sums = _looked_at(
            *(k, v, q, new, made, place, at, high, hidden, scale, lowest, peak, total, sums)
        )
    if (head % (heads // groups) == 0) & (at >= low) & (at < high):
        tl.store(keys + ring + at * width + d, new.to(kind), mask=there)
        tl.store(values + ring + at * width + d, made.to(kind), mask=there)
    spot = out + row * heads * width + head * width + d
    if SPLIT == 1:
        tl.store(spot, (sums / total).to(kind), mask=there)
    else:
        step = width + 2
        own = partial + (which * SPLIT + split) * step
        tl.store(own + d, sums, mask=there)
        tl.store(own + width, peak)
        tl.store(own + width + 1, total)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + which, 1, sem="acq_rel")
        if last == SPLIT - 1:
            tl.store(arrived + which, 0)
            _together(
                partial + which * SPLIT * step, spot, d, there, width, lowest, kind, SPLIT, WIDTH
            )


@triton.jit
def _looked_at(
    k, v, q, new, made, place, at, high, hidden, scale, lowest, peak, total, sums
):  # fmt: skip
    """The largest score, the sum of weights and the weighted sum, with some places more."""
    inside = place < high
    # What comes in is not there yet, or only for some programs.
    fresh = (place == at)[:, None]
    k = tl.where(fresh, new[None, :], k.to(tl.float32))
    v = tl.where(fresh, made[None, :], v.to(tl.float32))
    score = tl.maximum(tl.sum(k * q[None, :], 1) * scale + hidden.to(tl.float32), lowest)
    score = tl.where(inside, score, lowest)
    higher = tl.maximum(peak, tl.max(score, 0))
    weight = tl.where(inside, tl.exp(score - higher), 0.0)
    less = tl.exp(peak - higher)
    total = total * less + tl.sum(weight, 0)
    sums = sums * less + tl.sum(weight[:, None] * v, 0)
    return higher, total, sums


@triton.jit
def _together(
    parts,
    spot,
    d,
    there,
    width,
    lowest,
    kind: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What the programs of a head have found, in their own order."""
    peak = tl.full((), lowest, tl.float32)
    for one in tl.static_range(SPLIT):
        peak = tl.maximum(peak, tl.load(parts + one * (width + 2) + width, cache_modifier=".cg"))
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for one in tl.static_range(SPLIT):
        own = parts + one * (width + 2)
        less = tl.exp(tl.load(own + width, cache_modifier=".cg") - peak)
        total += tl.load(own + width + 1, cache_modifier=".cg") * less
        sums += tl.load(own + d, mask=there, other=0.0, cache_modifier=".cg") * less
    tl.store(spot, (sums / total).to(kind), mask=there)


@triton.jit
def _turned(place, d, other, there, cosine, sine, kind: tl.constexpr):
    """A vector under its rotary embedding, rounded where torch rounds."""
    own = tl.load(place + d, mask=there, other=0.0).to(tl.float32)
    against = tl.load(place + other, mask=there, other=0.0).to(tl.float32)
    a = (own * cosine).to(kind).to(tl.float32)
    b = (against * sine).to(kind).to(tl.float32)
    return (a + b).to(kind).to(tl.float32)
