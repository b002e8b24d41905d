"""Products that leave out rows of a weight as it lies, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsity_atlas.decoding.cuda_entries import NONZERO, activated, product, which_kept


@triton.jit
def by_outputs(
    x,
    weight,
    second,
    bias,
    flags,
    out,
    cuts,
    K,
    N,
    rows,
    KEEP: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DECIDES: tl.constexpr,
    BATCH: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Entries of W x from rows of W [N, K], of which those that are not wanted are not read.

    A program has BR rows. Without an activation: y = f ⊙ (W x) for the factors f in `flags`, where they
    are not zero. With one: u ⊙ σ(g) of two maps; where DECIDES, `weight` is that map of the two whose
    entries decide which of the other's rows are read: 1 it is g, 2 it is u. Of what it drops, zeros are
    left.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    there = n < N
    token = tl.arange(0, BATCH)
    kind = out.dtype.element_ty
    cell = token[:, None] * N + n[None, :]
    known = (token < rows)[:, None] & there[None, :]
    channel = tl.broadcast_to(n[None, :], (BATCH, BR))
    factor = tl.zeros((BATCH, BR), tl.float32)
    kept = known
    wanted = there
    if ACTIVATION == 0 and KEEP == NONZERO:
        factor = tl.load(flags + cell, mask=known, other=0.0).to(tl.float32)
        kept = which_kept(factor, cuts, channel, known, False, KEEP)
        wanted = tl.max(kept.to(tl.int32), 0) > 0
    if DECIDES:
        first = _rows_by(x, weight, n, wanted, token, K, rows, BATCH, BR, BK, UNIT)
        first = first.to(kind).to(tl.float32)
        if DECIDES == 1:
            first = activated(first, kind, ACTIVATION)
        kept = which_kept(first, cuts, channel, known, BY_CHANNEL, KEEP)
        wanted = tl.max(kept.to(tl.int32), 0) > 0
        found = _rows_by(x, second, n, wanted, token, K, rows, BATCH, BR, BK, UNIT)
        found = found.to(kind).to(tl.float32)
        if DECIDES == 2:
            found = activated(found, kind, ACTIVATION)
        total = tl.where(kept, first * found, 0.0)
    elif ACTIVATION:
        up, gate = _rows_by_two(x, weight, second, n, there, token, K, rows, BATCH, BR, BK, UNIT)
        total = product(up, gate, kind, ACTIVATION)
    else:
        total = _rows_by(x, weight, n, wanted, token, K, rows, BATCH, BR, BK, UNIT)
        if BIAS:
            total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
        if KEEP == NONZERO:
            total = tl.where(kept, total.to(kind).to(tl.float32) * factor, 0.0)
    tl.store(out + cell, total.to(kind), mask=known)


@triton.jit
def _rows_by(
    x,
    weight,
    n,
    wanted,
    token,
    K,
    rows,
    BATCH: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """W x for some rows of W, float32 [BATCH, BR]; zero where a row is not wanted."""
    sums = tl.zeros((BR, BK), tl.float32) if BATCH == 1 else tl.zeros((BATCH, BR), tl.float32)
    for low in range(0, K, BK):
        k = low + tl.arange(0, BK)
        inside = k < K
        where = n[:, None].to(tl.int64) * K + k[None, :]
        w = tl.load(
            weight + where,
            mask=wanted[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if BATCH == 1:
            value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * value[None, :]
        else:
            within = (token < rows)[:, None] & inside[None, :]
            values = tl.load(x + token[:, None] * K + k[None, :], mask=within, other=0.0)
            sums = tl.dot(values.to(UNIT), tl.trans(w).to(UNIT), sums, input_precision="ieee")
    if BATCH == 1:
        return tl.sum(sums, 1)[None, :]
    else:
        return sums


@triton.jit
def _rows_by_two(
    x,
    weight,
    second,
    n,
    there,
    token,
    K,
    rows,
    BATCH: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """As `_rows_by`, of two maps side by side."""
    if BATCH == 1:
        sums = tl.zeros((BR, BK), tl.float32)
        gates = tl.zeros((BR, BK), tl.float32)
    else:
        sums = tl.zeros((BATCH, BR), tl.float32)
        gates = tl.zeros((BATCH, BR), tl.float32)
    for low in range(0, K, BK):
        k = low + tl.arange(0, BK)
        inside = k < K
        where = n[:, None].to(tl.int64) * K + k[None, :]
        needed = there[:, None] & inside[None, :]
        w = tl.load(weight + where, mask=needed, other=0.0, eviction_policy="evict_first")
        v = tl.load(second + where, mask=needed, other=0.0, eviction_policy="evict_first")
        if BATCH == 1:
            value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * value[None, :]
            gates += v.to(tl.float32) * value[None, :]
        else:
            within = (token < rows)[:, None] & inside[None, :]
            values = tl.load(x + token[:, None] * K + k[None, :], mask=within, other=0.0)
            sums = tl.dot(values.to(UNIT), tl.trans(w).to(UNIT), sums, input_precision="ieee")
            gates = tl.dot(values.to(UNIT), tl.trans(v).to(UNIT), gates, input_precision="ieee")
    if BATCH == 1:
        return tl.sum(sums, 1)[None, :], tl.sum(gates, 1)[None, :]
    else:
        return sums, gates
