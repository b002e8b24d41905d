"""Bias compensation: what is dropped comes back as its mean, by a constant vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsity_atlas.criteria.built_in.quantile import Quantile
from sparsity_atlas.criteria.level_table import TARGETS, at_level

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample


class BiasCompensation(Quantile):
    """Keep |v| ≥ t, and add E[(1 − m) ⊙ v], the mean of what is dropped, to every vector.

    The mean is over the calibration tokens, by channel. A linear map that reads v takes the constant
    into a bias, so that nothing more is read for it. The idea of SPON (arXiv 2512.12744), whose
    vectors are trained, with the vector that is right in the mean. The level is the target sparsity,
    as of TEAL, from which only this vector differs: dropped entries count as dropped.

    Means are found at each per cent of sparsity, and interpolated between.
    """

    sites = ("input", "intermediate", "all_inputs", "qkv_input", "o_input", "all_linear_inputs")
    calibrated = True
    allocated = True
    by_channel = True

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        state = super().calibrate(place, sample)
        values = sample.read(place.tensor)
        return {**state, "means": _means_below(values, state["table"])}

    def _bias(self, level: float) -> Tensor:
        place = float(np.interp(self._own(level), TARGETS, np.arange(len(TARGETS))))
        below = min(int(place), len(TARGETS) - 2)
        means = self._state["means"]
        return torch.lerp(means[below], means[below + 1], place - below)

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor:
        """See `Criterion.replace`."""
        return torch.where(mask, written, 0) + self._bias(level).to(written.dtype)

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`; `bias` is what each vector gets, [width]."""
        return {**super().export(level), "bias": self._bias(level)}


def _means_below(values: Tensor, table: Tensor) -> Tensor:
    """Mean over all tokens of what each threshold drops: float32 [thresholds, width].

    Args:
        values: [tokens, width].
        table: of `quantile_table`; a threshold for each of `TARGETS` is taken from it.
    """
    thresholds = torch.stack([at_level(table, level) for level in TARGETS.tolist()])
    # Each entry is dropped by all thresholds above it: it is added at the first of them.
    first = torch.searchsorted(thresholds, values.abs().cpu().contiguous(), right=True)
    sums = torch.zeros(len(thresholds) + 1, values.shape[1], dtype=torch.float64)
    sums.scatter_add_(0, first, values.cpu().double())
    return (sums[:-1].cumsum(0) / len(values)).float().to(values.device)
