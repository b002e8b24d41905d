"""Top-p: keep the fewest entries that hold a share p of the row's magnitude."""

from __future__ import annotations

import math

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import Threshold


class TopP(Criterion):
    """Keep the largest |v| until their running sum of |v|^q reaches p · Σ|v|^q.

    The smallest-support mask m with ‖m ⊙ v‖_q^q ≥ p ‖v‖_q^q (arXiv 2509.00454, q = 1; q = 2 keeps
    energy). The entry that crosses p is kept, so p = 0 keeps the largest; p = 1 changes nothing;
    an all-zero row is left alone. Sums are exact, see `Threshold`.
    """

    dense_level = 1.0
    coarse_levels = ("0.98", "0.9", "0.75", "0.5")

    def __init__(self, power: float = 1.0) -> None:
        number = isinstance(power, int | float) and not isinstance(power, bool)
        if not number or not 1 <= power < math.inf:
            raise ValueError(f"power: expected a number of at least 1, found {power!r}")
        self.power = float(power)

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        return Threshold("share", level, self.power)
