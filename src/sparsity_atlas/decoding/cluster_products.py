"""Products of one token by inputs, by clusters of blocks: what is launched, and how it is cut into blocks."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from sparsity_atlas.decoding import cuda_sources
from sparsity_atlas.decoding.cuda_entries import ACTIVATIONS
from sparsity_atlas.decoding.cuda_sources import READ, TYPES
from sparsity_atlas.decoding.vector import LIKELY, Keep
from sparsity_atlas.kernels.cuda_share import LEAST_WIDTH, first_guess
from sparsity_atlas.kernels.definition import limbs, mass_bits

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.decoding.vector import Norm, Vector
    from sparsity_atlas.kernels.definition import Threshold

# Rows that are looked at together.
_CHUNK = 32
# Shared memory of a processor, less what it needs itself; share of the blocks' places that clusters fill.
_SHARED, _FILLED = 200 * 1024, 0.9
# Slices of the whole vector that a thread holds at most where it finds a threshold.
_HELD = 8


class Plan(NamedTuple):
    """How a product is cut into clusters.

    Attributes:
        threads: of a block.
        per_row: of these side by side along a row, 16 bytes each; the others go on to other rows.
        split: blocks of a cluster, which share a tile of columns.
        unroll: rows that a thread reads at once.
        blocks: of a processor, that registers are left for.
    """

    threads: int
    per_row: int
    split: int
    unroll: int
    blocks: int

    def chunks(self, inputs: int) -> int:
        """Of rows, that a block has at most."""
        return math.ceil(math.ceil(inputs / _CHUNK) / self.split)

    def shared(self, inputs: int, size: int, maps: int) -> int:
        """Bytes of shared memory that a block has: what comes in, counts, and a list or parts of sums."""
        chunks, columns = self.chunks(inputs), self.per_row * READ // size
        own = 4 * maps * self.split * math.ceil(columns / self.split)
        # Threads of a warp that have the same columns add up among themselves.
        # A list goes on beyond its end, twice as far as a block looks at once.
        beyond = 2 * self.threads // self.per_row * self.unroll
        listed = 8 * (_CHUNK * chunks + beyond)
        parts = 4 * maps * columns * self.threads // max(self.per_row, 32)
        searched = 1152 + 5 * self.threads  # `Search` of `row_share.cu`
        room = 144 + 16 * (math.ceil(own / 16) + math.ceil(chunks / 4))  # a gate, and sums of warps
        return room + max(listed, parts, searched)


# By inputs, outputs, and whether two maps are made together: from which share of dropped entries on a plan is
# taken. They were best on an H200 for one token of bfloat16, as `benchmarks/decoding_tune.py` finds it; Llama
# 3.2 1B, 3.1 8B and the factors of 70B.
PLANS: dict[tuple[int, int, bool], dict[float, Plan]] = {
    (2048, 8192, False): {0: Plan(512, 16, 2, 8, 1)},
    (8192, 2048, False): {0: Plan(512, 16, 8, 6, 2), 0.55: Plan(256, 16, 16, 8, 3)},
    (2048, 8192, True): {0: Plan(512, 16, 2, 8, 1)},
    (4096, 14336, False): {0: Plan(512, 64, 8, 4, 2), 0.75: Plan(512, 32, 4, 4, 2)},
    (14336, 4096, False): {0: Plan(512, 32, 8, 6, 2), 0.75: Plan(256, 32, 16, 8, 3)},
    (4096, 14336, True): {0: Plan(512, 64, 4, 4, 1)},
    (8192, 28672, True): {0: Plan(256, 64, 4, 3, 3)},
    (4096, 6144, False): {
        **{0: Plan(256, 32, 16, 4, 4), 0.4: Plan(256, 32, 16, 6, 4)},
        **{0.55: Plan(128, 16, 16, 8, 8)},
    },
    (4096, 4096, False): {0: Plan(256, 16, 8, 6, 3), 0.55: Plan(256, 32, 16, 8, 3)},
}


def plan_of(
    inputs: int,
    outputs: int,
    size: int,
    gated: bool,
    device: torch.device,
    expected: float = LIKELY,
) -> Plan | None:
    """How a product is cut; None where the kernel is not made for it, or the device has no clusters.

    Args:
        inputs: rows of the transposed weight.
        outputs: its columns.
        size: bytes of a number.
        gated: whether two maps are made together.
        device: that it is made on.
        expected: share of the rows that is likely left out.
    """
    slices = inputs * (outputs * size // READ)  # which a list has 32 bits for
    if outputs * size % READ or slices >= 1 << 31 or not cuda_sources.has_clusters(device):
        return None
    known = PLANS.get((inputs, outputs, gated)) if size == 2 else None
    if known:
        plan = known[max(least for least in known if least <= max(expected, 0))]
    else:
        plan = likely(outputs, size, gated, cuda_sources.processors(device))
    return plan if plan.shared(inputs, size, 1 + gated) * plan.blocks <= _SHARED else None


def likely(outputs: int, size: int, gated: bool, processors: int) -> Plan:
    """As many blocks as there is place for at once: a cluster has to find its own close together."""
    threads, blocks = 256, 4
    most = _FILLED * blocks * processors
    plans = [
        Plan(threads, per_row, split, 2 if gated else 4, blocks)
        for per_row in (32, 16, 64)
        for split in (1, 2, 4, 8, 16)
    ]

    def made(plan: Plan) -> int:
        return math.ceil(outputs * size / (plan.per_row * READ)) * plan.split

    fitting = [plan for plan in plans if made(plan) <= most]
    return max(fitting, key=made) if fitting else min(plans, key=made)


def finds(vector: Vector, plan: Plan) -> bool:
    """Whether the kernel masks a vector as it is told to; else that takes a step before it."""
    x = vector.values
    if vector.keep is not Keep.SHARE:
        return True
    inputs, size = x.shape[1], x.element_size()
    whole = inputs * size % READ == 0 and x.data_ptr() % READ == 0
    held = math.ceil(inputs * size / READ / plan.threads)
    return size == 2 and whole and inputs >= LEAST_WIDTH and held <= _HELD


def _share(rule: Threshold) -> tuple[int, ...]:
    """What the kernel is told of a share of the mass."""
    rest = max(1 - rule.amount, 0.0)
    return *(_bits(one) for one in (rest, *first_guess(rule))), *limbs(rule.amount)


def _bits(number: float) -> int:
    """Of a float32, as a signed integer."""
    (bits,) = struct.unpack("i", struct.pack("f", number))
    return int(bits)


def by_inputs(
    vector: Vector,
    weight: Tensor,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    plan: Plan,
    norm: Norm | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """As `cuda_products.by_inputs`, of one token.

    Args:
        vector: x [1, K] and its mask.
        weight: Wᵀ, or W_uᵀ, [K, N], contiguous.
        second: W_gᵀ, of the same shape; with an activation.
        bias: [N]; without an activation.
        activation: one of `ACTIVATIONS`.
        plan: of `plan_of`.
        norm: that makes the vector of x, whose rows are whole slices of 16 bytes.
        total: [1, K], for x + more, with a norm.

    Returns:
        [1, N], of the type of x.
    """
    x = vector.values.contiguous()
    assert finds(vector, plan)
    (tokens, inputs), outputs = x.shape, weight.shape[1]
    assert tokens == 1
    size, maps = x.element_size(), 1 if second is None else 2
    columns = plan.per_row * READ // size
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    shared = plan.shared(inputs, size, maps)
    assert weight.data_ptr() % READ == 0
    defined = {
        "TYPE": TYPES[x.dtype],
        "THREADS": plan.threads,
        "PER_ROW": plan.per_row,
        "SPLIT": plan.split,
        "UNROLL": plan.unroll,
        "BLOCKS": plan.blocks,
        "CHUNKS": plan.chunks(inputs),
        "KEEP": int(vector.keep),
        "BY_CHANNEL": int(vector.by_channel),
        "MAPS": maps,
        "ACTIVATION": ACTIVATIONS[activation] if activation else 0,
        "BIAS": int(bias is not None),
        "NORM": 0,
    }
    more = scale = x
    if norm is not None:
        assert total is not None
        assert inputs * size % READ == 0
        assert x.data_ptr() % READ == 0
        more, scale = x if norm.more is None else norm.more.contiguous(), norm.weight
        assert more.data_ptr() % READ == 0
        defined["NORM"] = math.ceil(inputs * size / READ / plan.threads)
        defined["MORE"] = int(norm.more is not None)
        defined["EPS"] = _bits(norm.eps)
    numbers: tuple[int, ...] = (inputs, outputs)
    if vector.keep is Keep.SHARE:
        assert vector.rule is not None
        defined["VECTORS"] = math.ceil(inputs * size / READ / plan.threads)
        defined["MASS_BITS"] = mass_bits(inputs)
        numbers += _share(vector.rule)
    cuts = x if vector.constants is None else vector.constants
    tensors = (
        *(x, weight, weight if second is None else second, weight if bias is None else bias),
        *(out, cuts, more, scale, x if total is None else total),
    )
    grid = plan.split, math.ceil(outputs / columns)
    cuda_sources.launch("cluster_product.cu", defined, grid, shared, tensors, numbers)
    return out
