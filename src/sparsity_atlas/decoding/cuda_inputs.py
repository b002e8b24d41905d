"""Products that leave out rows of a transposed weight, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsity_atlas.decoding.cuda_entries import product, which_kept


@triton.jit
def by_inputs(
    x,
    weight,
    second,
    bias,
    out,
    partial,
    arrived,
    lists,
    cuts,
    K,
    N,
    rows,
    parts,
    KEEP: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINES: tl.constexpr,
    UNITS: tl.constexpr,
    ALONE: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    LISTED: tl.constexpr,
    UNIT: tl.constexpr,
    CHAINED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = W (x ⊙ m) from rows of Wᵀ [K, N], of which those that no x keeps are not read.

    A program has BN columns and a part of the rows, BK at a time. LISTED: it first lists the rows
    that it needs, so that all that it asks for at once is needed. With an activation there are two maps, u
    and g, and u ⊙ σ(g) is made. With UNITS the vectors of up to 16 tokens meet a row together on the matrix
    units, to which a single one is a sixteenth; LINES is 1 for it, and 16 for several.
    """
    if CHAINED:
        # The next launch may take its place already; this one waits for what the last one wrote.
        gdc_launch_dependents()
        gdc_wait()
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    there = n < N
    # A multiple of BK, so that tiles are aligned.
    per = tl.cdiv(tl.cdiv(K, parts), BK) * BK
    low = split * per
    high = tl.minimum(low + per, K)
    BATCH: tl.constexpr = 16 if UNITS else 1
    token = tl.arange(0, BATCH)
    count = high - low
    places = lists
    if LISTED:
        own = low + tl.arange(0, PER)
        if BATCH == 1:
            entry = tl.load(x + own, mask=own < high, other=0.0).to(tl.float32)
            listed = which_kept(entry, cuts, own, own < high, BY_CHANNEL, KEEP)
        else:
            among = (token < rows)[:, None] & (own < high)[None, :]
            entries = tl.load(x + token[:, None] * K + own[None, :], mask=among, other=0.0)
            of = tl.broadcast_to(own[None, :], (BATCH, PER))
            held = which_kept(entries.to(tl.float32), cuts, of, among, BY_CHANNEL, KEEP)
            listed = tl.max(held.to(tl.int32), 0) > 0
        place = tl.cumsum(listed.to(tl.int32), 0) - 1
        places = lists + (tile * parts + split) * PER
        tl.store(places + place, own, mask=listed)
        count = tl.sum(listed.to(tl.int32), 0)
        tl.debug_barrier()
    if BATCH == 1:
        sums = tl.zeros((LANES, BN), tl.float32)
        gates = tl.zeros((LANES, BN), tl.float32)
    else:
        sums = tl.zeros((BATCH, BN), tl.float32)
        gates = tl.zeros((BATCH, BN), tl.float32)
    for first in tl.range(0, count, BK, num_stages=STAGES):
        slot = first + tl.arange(0, BK)
        k = tl.load(places + slot, mask=slot < count, other=0) if LISTED else low + slot
        inside = slot < count
        if BATCH == 1:
            value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
            wanted = inside
            if not LISTED:
                wanted = which_kept(value, cuts, k, inside, BY_CHANNEL, KEEP)
        else:
            within = (token < rows)[:, None] & inside[None, :]
            values = tl.load(x + token[:, None] * K + k[None, :], mask=within, other=0.0)
            channel = tl.broadcast_to(k[None, :], (BATCH, BK))
            kept = which_kept(values.to(tl.float32), cuts, channel, within, BY_CHANNEL, KEEP)
            wanted = tl.max(kept.to(tl.int32), 0) > 0
            values = tl.where(kept, values, 0.0)
        where = k[:, None].to(tl.int64) * N + n[None, :]
        needed = wanted[:, None] & there[None, :]
        w = tl.load(weight + where, mask=needed, other=0.0, eviction_policy="evict_first")
        if ACTIVATION:
            v = tl.load(second + where, mask=needed, other=0.0, eviction_policy="evict_first")
        if BATCH == 1:
            # Rows that a thread holds are added up in it, and those of other threads at the end.
            made = w.to(tl.float32) * value[:, None]
            sums += tl.sum(tl.reshape(made, (BK // LANES, LANES, BN)), 0)
            if ACTIVATION:
                made = v.to(tl.float32) * value[:, None]
                gates += tl.sum(tl.reshape(made, (BK // LANES, LANES, BN)), 0)
        else:
            sums = tl.dot(values.to(UNIT), w.to(UNIT), sums, input_precision="ieee")
            if ACTIVATION:
                gates = tl.dot(values.to(UNIT), v.to(UNIT), gates, input_precision="ieee")
    kind = out.dtype.element_ty
    if LINES == 1:
        # Of a single token on the matrix units all other lines are zero.
        sums = tl.sum(sums, 0)[None, :]
        gates = tl.sum(gates, 0)[None, :]
    line = tl.arange(0, LINES)
    cell = line[:, None] * N + n[None, :]
    known = (line < rows)[:, None] & there[None, :]
    layer = LINES * N
    last = 0
    if not ALONE:
        tl.store(partial + split * layer + cell, sums, mask=known)
        if ACTIVATION:
            tl.store(partial + (parts + split) * layer + cell, gates, mask=known)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
    if ALONE or last == parts - 1:
        if not ALONE:
            tl.store(arrived + tile, 0)
            if LINES == 1:
                sums = _whole(partial, 0, parts, n, there, N, BN)[None, :]
                if ACTIVATION:
                    gates = _whole(partial, parts, parts, n, there, N, BN)[None, :]
            else:
                sums = tl.zeros((LINES, BN), tl.float32)
                gates = tl.zeros((LINES, BN), tl.float32)
                for one in range(parts):
                    spot = partial + one * layer + cell
                    sums += tl.load(spot, mask=known, cache_modifier=".cg")
                    if ACTIVATION:
                        spot += parts * layer
                        gates += tl.load(spot, mask=known, cache_modifier=".cg")
        if BIAS:
            sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION:
            sums = product(sums, gates, kind, ACTIVATION)
        tl.store(out + cell, sums.to(kind), mask=known)


@triton.jit
def _whole(partial, begin, parts, n, there, N, BN: tl.constexpr):
    """The sum of all programs' parts in their own order, eight of them read at once.

    They are not read from this processor's own cache, which may have what lay there before.
    """
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, parts, 8):
        part = first + tl.arange(0, 8)
        place = (begin + part)[:, None] * N + n[None, :]
        mask = (part < parts)[:, None] & there[None, :]
        total += tl.sum(tl.load(partial + place, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    return total
