"""Threshold: one magnitude for the whole model."""

from __future__ import annotations

import numpy as np
import torch

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.threshold import Threshold


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
        least = np.float32(level)
        # As Python floats: NumPy would round the level, too, before it compares.
        if float(least) < level:
            # What float32 rounds down must not let smaller entries pass.
            least = np.nextafter(least, np.float32(np.inf))
        return Threshold("fixed", constants=torch.tensor([least]))
