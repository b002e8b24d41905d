"""Top-k: keep a fixed share of each row's entries."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from sparsity_atlas.criteria.base import Criterion


class TopK(Criterion):
    """Keep the k = ⌊level · width⌋ largest |v| of each row, and what ties with the last of them.

    level = 1 changes nothing, level = 0 (and any k = 0) drops the whole row.
    """

    dense_level = 1.0
    coarse_levels = ("0.8", "0.6", "0.4", "0.2")

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        width = values.shape[-1]
        # The decimal that the user wrote, not its binary neighbour: ⌊0.29 · 100⌋ is 29.
        kept = math.floor(Fraction(repr(level)) * width)
        if kept == width:
            return torch.ones_like(values, dtype=torch.bool)
        if kept == 0:
            return torch.zeros_like(values, dtype=torch.bool)
        magnitude = values.abs()
        threshold = magnitude.kthvalue(width - kept + 1, dim=-1, keepdim=True).values
        return magnitude >= threshold
