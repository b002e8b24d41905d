"""Threshold: one magnitude for the whole model."""

from __future__ import annotations

import torch

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import Threshold, rounded_up


class GlobalThreshold(Criterion):
    """Keep |v| ≥ level, in every layer alike.

    On a ReLU gate this is FATReLU, g if g ≥ t else 0 (ProSparse, arXiv 2402.13516, t = 0.01); the
    magnitude takes the place of the value so that it means something for other activations too.
    The level is in the activation's own unit. level = 0 changes nothing.
    """

    highest = 1000.0
    dense_level = 0.0
    coarse_levels = ("0.01", "0.05", "0.2", "1")

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        least = rounded_up(torch.tensor([level], dtype=torch.float64))
        return Threshold("fixed", constants=least)
