"""What the products of one step of decoding have in common, in Triton; `cuda_products` launches them.

Sums have a fixed order: a program adds up in registers, and the last program of a tile adds the partial
sums of all of them in their own order. So results are the same in each run, and no memory has to be
cleared first.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What is done with the first of two maps before it is multiplied by the second.
ACTIVATIONS = {"silu": 1, "relu": 2}
SILU, RELU = (tl.constexpr(number) for number in ACTIVATIONS.values())
# How an entry of the vector is kept: all are, those that are not zero, those that reach a constant.
ALL, NONZERO, REACHES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def which_kept(x, cuts, channel, inside, BY_CHANNEL: tl.constexpr, KEEP: tl.constexpr):
    """Which entries of a vector are kept. NaN, which compares with nothing, is."""
    if KEEP == ALL:
        return inside
    if KEEP == NONZERO:
        return inside & (x != 0)
    cut = tl.load(cuts + channel, mask=inside, other=0.0) if BY_CHANNEL else tl.load(cuts)
    return inside & ((tl.abs(x) < cut) == 0)


@triton.jit
def product(up, gate, kind: tl.constexpr, ACTIVATION: tl.constexpr):
    """u ⊙ σ(g), rounded to the type where torch rounds."""
    u = up.to(kind).to(tl.float32)
    g = gate.to(kind).to(tl.float32)
    return u * activated(g, kind, ACTIVATION)


@triton.jit
def activated(g, kind: tl.constexpr, ACTIVATION: tl.constexpr):
    """σ(g), rounded to the type."""
    g = g / (1 + tl.exp(-g)) if ACTIVATION == SILU else tl.where(g < 0, 0.0, g)
    return g.to(kind).to(tl.float32)
