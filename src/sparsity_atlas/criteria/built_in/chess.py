"""CHESS: thresholds on the gate, by channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity_atlas.criteria.built_in.quantile import Quantile
from sparsity_atlas.criteria.level_table import by_channel, quantile_table

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample


class Chess(Quantile):
    """Keep |g_j| ≥ √(τ / E[u_j²]), where τ is the level-quantile of g_j² · E[u_j²] (arXiv 2409.01366).

    The importance g_j² · E[u_j²] is what dropping the entry is expected to take from the product
    u ⊙ g, squared. E and the quantile are over the calibration tokens, for each layer by itself.
    The level is the target sparsity, the same for all layers.
    """

    sites = ("gate",)
    calibrated = True
    allocated = True
    by_channel = True

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        rms = sample.read("up").square().mean(0).sqrt()
        return {"rms": rms, "table": quantile_table(sample.read("gate").abs() * rms)}

    def thresholds(self, level: float) -> Tensor:
        """See `Quantile.thresholds`."""
        return by_channel(self._threshold(level), self._state["rms"])
