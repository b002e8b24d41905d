"""Quantile: one threshold for each layer, found on a calibration text."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.thresholds import at_level, quantile_table

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.place import Place, Sample


class Quantile(Criterion):
    """Keep |v| ≥ t, where t is the level-quantile of the layer's |v| over the calibration tokens.

    The rule of TEAL, CATS and COUNTDOWN-M at any site. The level is the target sparsity: the share
    of the layer's entries that was dropped in calibration. level = 0 changes nothing, level = 1
    drops everything.
    """

    dense_level = 0.0
    coarse_levels = ("0.2", "0.4", "0.6", "0.8")
    calibrated = True

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        return {"table": quantile_table(sample.read(place.tensor).abs())}

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = copy.copy(self)
        bound._state = state
        return bound

    def thresholds(self, level: float) -> Tensor:
        """What |v| must reach, of a bound criterion: float32 [], or [width] by channel."""
        return at_level(self._state["table"], level)

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        return values.abs().float() >= self.thresholds(level)

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`."""
        return {"threshold": self.thresholds(level)}
