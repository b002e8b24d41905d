"""Max-p: keep what is not small beside the row's largest entry."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_atlas.criteria.base import Criterion


class MaxP(Criterion):
    """Keep |v| ≥ level · max|v| (arXiv 2509.00454).

    level = 0 changes nothing, level = 1 keeps the largest entry and its ties, an all-zero row is
    left alone. The product is taken in float64, so that no rounding moves the threshold.
    """

    dense_level = 0.0
    coarse_levels = ("0.01", "0.04", "0.1", "0.25")

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        magnitude = values.abs()
        exact = magnitude.amax(dim=-1, keepdim=True).double() * level
        threshold = exact.to(values.dtype)
        # Rounded down, it would keep an entry that lies below the exact product.
        raised = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
        threshold = torch.where(threshold.double() < exact, raised, threshold)
        return magnitude >= threshold
