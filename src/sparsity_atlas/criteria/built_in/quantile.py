"""Quantile: one threshold for each layer, found on a calibration text."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import numpy as np

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.criteria.level_table import TARGETS, at_level, quantile_table, share_dropped
from sparsity_atlas.criteria.reach import Reach
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.terms import ALLOCATIONS

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample


class Quantile(Criterion):
    """Keep |v| ≥ t, where t is the level-quantile of the layer's |v| over the calibration tokens.

    The rule of TEAL, CATS and COUNTDOWN-M at any site. The level is the target sparsity: the share
    of the layer's entries that was dropped in calibration. level = 0 changes nothing, level = 1
    drops everything.

    Every layer has the level for its sparsity, or one of its own by `allocation`: equal_cett,
    sensitivity, greedy or evolutionary, which the module `allocation` describes.
    """

    dense_level = 0.0
    coarse_levels = ("0.2", "0.4", "0.6", "0.8")
    calibrated = True
    allocated = True
    looks_at_weights = False
    _state: dict[str, Tensor]
    _share: np.ndarray | None

    def __init__(self, allocation: str = "uniform") -> None:
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation: expected {', '.join(ALLOCATIONS)}, found {allocation!r}")
        self.allocation = allocation

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        return {"table": quantile_table(sample.read(place.tensor).abs())}

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = copy.copy(self)
        bound._state = state
        # Read where it is used with the level, which is a number of Python's.
        bound._share = state["share"].cpu().numpy() if "share" in state else None
        return bound

    def _threshold(self, level: float) -> Tensor:
        """The table's threshold at what is this place's own level."""
        return at_level(self._state["table"], self._own(level))

    def _own(self, level: float) -> float:
        """The place's own sparsity at a level."""
        return _own(level, self._share)

    def _asked(self, level: float) -> float:
        """The sparsity that a level asks for."""
        return level

    def reach(self, state: dict[str, Tensor], level: float) -> Reach | None:
        """See `Criterion.reach`."""
        if level == self.dense_level:
            return None
        share = state["share"].cpu().numpy() if "share" in state else None
        target = _own(self._asked(level), share)
        return Reach(
            "sparsity", target, share_dropped(state["table"], at_level(state["table"], target))
        )

    def thresholds(self, level: float) -> Tensor:
        """What |v| must reach, of a bound criterion: float32 [], or [width] by channel."""
        return self._threshold(level)

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        return Threshold("fixed", constants=self.thresholds(level).reshape(-1))

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`."""
        return {"threshold": self.thresholds(level)}


def _own(level: float, share: np.ndarray | None) -> float:
    """A place's own sparsity at a level, where an allocation says so."""
    return level if share is None else float(np.interp(level, TARGETS, share))
