"""Max-p: keep what is not small beside the row's largest entry."""

from __future__ import annotations

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import Threshold


class MaxP(Criterion):
    """Keep |v| ≥ level · max|v| (arXiv 2509.00454).

    level = 0 changes nothing, level = 1 keeps the largest entry and its ties, an all-zero row is
    left alone. The product is taken in float64, so that no rounding moves the threshold.
    """

    dense_level = 0.0
    coarse_levels = ("0.01", "0.04", "0.1", "0.25")

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        return Threshold("peak", level)
