"""Top-k: keep a fixed share of each row's entries."""

from __future__ import annotations

import math

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import Threshold, decimal


class TopK(Criterion):
    """Keep the k = ⌊level · width⌋ largest |v| of each row, and what ties with the last of them.

    level = 1 changes nothing, level = 0 (and any k = 0) drops the whole row.
    """

    dense_level = 1.0
    coarse_levels = ("0.8", "0.6", "0.4", "0.2")

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        # The decimal that the user wrote, not its binary neighbour: ⌊0.29 · 100⌋ is 29.
        return Threshold("rank", math.floor(decimal(level) * width))
