"""Mean compensation: COUNTDOWN-M, with the mean gate where the gate is not computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsity_atlas.criteria.built_in.quantile import Quantile

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample


class MeanCompensation(Quantile):
    """Keep the entries with |u| ≥ t; a dropped one becomes u_j · mean(g_j) in place of 0.

    Dropped entries of g are not computed, u is; the mean is over the calibration tokens, by
    channel. The level is the target sparsity, as of COUNTDOWN-M, from which only what takes the
    dropped entries' place differs: they count as dropped all the same. No paper's: COUNTDOWN-M
    (arXiv 2505.17701) with the expectation that CHESS (arXiv 2409.01366) takes of the other factor.
    """

    sites = ("up",)
    calibrated = True
    allocated = True
    by_channel = True

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        mean = sample.read("gate").double().mean(0).float()
        return {**super().calibrate(place, sample), "mean": mean}

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor:
        """See `Criterion.replace`."""
        return torch.where(mask, written, (values * self._state["mean"]).to(written.dtype))

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`; `mean` is mean(g), [width]."""
        return {**super().export(level), "mean": self._state["mean"]}
