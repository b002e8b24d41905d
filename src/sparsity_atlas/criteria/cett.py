"""CETT: a threshold for each layer, such that dropping costs a given share of the FFN's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from sparsity_atlas.criteria.quantile import Quantile
from sparsity_atlas.thresholds import STEPS, at_level, by_channel, quantile_table

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.place import Place, Sample

# Thresholds whose CETT is measured; those between are interpolated, within 0.5 % of their target.
KNOTS = 64


class Cett(Quantile):
    """Keep neurons with |i_j| · ‖W_d[:, j]‖₂ ≥ ε, where ε gives the layer the CETT that is the level.

    CETT, the cumulative error of tail truncation, is the mean over tokens of ‖W_d i_D‖ / ‖FFN(x)‖
    where D are the dropped neurons (Sparsing Law, arXiv 2411.02335; ReLU² Wins, arXiv 2402.03804;
    arXiv 2405.09274 uses 0.2). The papers bisect ε for one CETT; here ε is tabulated over CETT,
    once for all levels. All layers have the same CETT and each its own sparsity. level = 0 changes
    nothing, level = 1 drops everything.
    """

    sites = ("intermediate",)
    calibrated = True
    coarse_levels = ("0.05", "0.1", "0.2", "0.4")

    def __init__(self) -> None:
        # Its layers have their own sparsities as it is.
        super().__init__()

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        i = sample.read("intermediate")
        scores = i.abs() * place.column_norms()
        quantiles = quantile_table(scores)
        sparsity = np.linspace(0, 1, KNOTS + 1)
        knots = [0.0]
        norm = place.outputs(i).norm(dim=-1)
        used = norm > 0
        for share in sparsity[1:]:
            dropped = torch.where(scores < at_level(quantiles, float(share)), i, 0)
            error = (dropped @ place.weight.T).norm(dim=-1)
            knots.append(float((error[used] / norm[used]).double().mean()) if used.any() else 0.0)
        # The last, of dropping everything, is 1 where there is no bias.
        cett = np.maximum.accumulate(knots)
        # Of equal errors the largest sparsity: exact zeros are dropped at no cost.
        distinct = np.append(np.diff(cett) > 0, True)
        targets = np.arange(STEPS) / STEPS
        wanted = np.ones(STEPS)  # what costs nothing, or never so much, is dropped
        if cett[-1] > 0:
            reached = PchipInterpolator(cett[distinct], sparsity[distinct])
            wanted[targets <= cett[-1]] = reached(targets[targets <= cett[-1]])
        finite = quantiles.double().numpy()
        finite[-1] = float(scores.max())
        table = np.interp(wanted, np.arange(STEPS + 1) / STEPS, finite)
        table[0] = 0
        return {"table": torch.from_numpy(np.append(table, np.inf))}

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        return super().bind(place, {**state, "norms": place.column_norms()})

    def thresholds(self, level: float) -> Tensor:
        """See `Quantile.thresholds`."""
        return by_channel(self._threshold(level), self._state["norms"])
