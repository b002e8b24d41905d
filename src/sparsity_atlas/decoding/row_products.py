"""Products of one token by outputs, in CUDA C++: what is launched, and how it is cut into blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from sparsity_atlas.decoding import cuda_sources
from sparsity_atlas.decoding.cuda_entries import ACTIVATIONS
from sparsity_atlas.decoding.cuda_sources import READ, TYPES

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.decoding.vector import Vector

# Of a row for each thread, all of which it has in registers.
_SLICES = 4


class Rows(NamedTuple):
    """How two factors are cut into blocks, which go round the rows.

    Attributes:
        threads: of a block.
        rows: of each map that a block asks for at once.
        blocks: of a processor.
    """

    threads: int
    rows: int
    blocks: int

    def slices(self, inputs: int, size: int) -> int:
        """Of a row for each thread."""
        return math.ceil(inputs * size / (self.threads * READ))


def rows_of(x: Tensor, weight: Tensor, second: Tensor, *, decides: bool) -> Rows | None:
    """How a product is cut; None where the kernel is not made for it.

    Args:
        x: [tokens, K].
        weight: [N, K], of the first factor.
        second: likewise, of the second.
        decides: whether the first factor decides which rows of the other are read.
    """
    size = x.element_size()
    aligned = all(one.is_contiguous() and one.data_ptr() % READ == 0 for one in (weight, second))
    inputs = x.shape[1]
    if (
        len(x) != 1
        or not aligned
        or inputs * size % READ
        or not cuda_sources.has_clusters(x.device)
    ):
        return None
    # What was best on an H200 for Llama 3.2 1B, 3.1 8B and 70B in bfloat16.
    threads = 128 if inputs * size <= 2 * 128 * READ else 256
    rows = Rows(threads, 2, 768 // threads)
    if rows.slices(inputs, size) > _SLICES // 2:
        rows = Rows(threads, 2, 2) if decides else Rows(threads, 1, 3)
    return rows if rows.slices(inputs, size) <= _SLICES else None


def factors(
    x: Tensor,
    weight: Tensor,
    second: Tensor,
    activation: str,
    *,
    decides: str | None,
    rule: Vector | None,
    rows: Rows,
) -> Tensor:
    """u ⊙ σ(g) of one token, as `cuda_products.by_outputs` gives it with an activation.

    Args:
        x: [1, K].
        weight: W_u [N, K], or the map that decides.
        second: W_g, or the other map.
        activation: one of `ACTIVATIONS`.
        decides: as there.
        rule: likewise.
        rows: of `rows_of`.

    Returns:
        [1, N], of the type of x.
    """
    x = x.contiguous()
    (_, inputs), outputs = x.shape, len(weight)
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    cuts = None if rule is None else rule.constants
    defined = {
        "TYPE": TYPES[x.dtype],
        "THREADS": rows.threads,
        "ROWS": rows.rows,
        "BLOCKS": rows.blocks,
        "SPLIT": 1,
        "SLICES": rows.slices(inputs, x.element_size()),
        "DECIDES": {None: 0, "gate": 1, "up": 2}[decides],
        "BY_CHANNEL": int(rule is not None and rule.by_channel),
        "ACTIVATION": ACTIVATIONS[activation],
    }
    blocks = min(math.ceil(outputs / rows.rows), rows.blocks * cuda_sources.processors(x.device))
    tensors = (x, weight, second, weight, out, x if cuts is None else cuts)
    shared = 16 * rows.rows * rows.threads // 32
    cuda_sources.launch("row_product.cu", defined, (1, blocks), shared, tensors, (inputs, outputs))
    return out
