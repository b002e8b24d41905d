"""CETT: a threshold for each layer, such that dropping costs a given share of the FFN's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.built_in.quantile import Quantile
from sparsity_atlas.criteria.error_table import ErrorTable, tabulate
from sparsity_atlas.criteria.level_table import by_channel
from sparsity_atlas.criteria.reach import Reach

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample


class Cett(Quantile):
    """Keep neurons with |i_j| · ‖W_d[:, j]‖₂ ≥ ε, where ε gives the layer the CETT that is the level.

    CETT, the cumulative error of tail truncation, is the mean over tokens of ‖W_d i_D‖ / ‖FFN(x)‖
    where D are the dropped neurons (Sparsing Law, arXiv 2411.02335; ReLU² Wins, arXiv 2402.03804;
    arXiv 2405.09274 uses 0.2). The papers bisect ε for one CETT; here it is measured at some hundred
    ε, which serve all levels: from 0.001 on a level is met within 0.5 % of it, or, where no ε does
    (entries that tie), the next lower CETT that one has. All layers have the same CETT and each its
    own sparsity. level = 0 changes nothing, level = 1 drops everything. Of routed experts the output is
    each expert's own, and the mean is over pairs of a token and one of its experts.
    """

    sites = ("intermediate",)
    calibrated = True
    looks_at_weights = True
    coarse_levels = ("0.05", "0.1", "0.2", "0.4")
    _table: ErrorTable
    norms: Tensor
    """‖W_d[:, j]‖₂ of the place that it is bound to: float32 [width]."""

    def __init__(self) -> None:
        # Its layers have their own sparsities as it is.
        super().__init__()

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        i = sample.read("intermediate")
        scores = i.abs() * place.column_norms()
        norm = place.outputs(i).norm(dim=-1)
        used = norm > 0

        def error(epsilon: float) -> float:
            dropped = torch.where(scores < epsilon, i, 0)
            lost = place.product(dropped).norm(dim=-1)
            return float((lost[used] / norm[used]).double().mean()) if used.any() else 0.0

        return tabulate(scores, error).state()

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = super().bind(place, state)
        bound._table, bound.norms = ErrorTable.from_state(state), place.column_norms()
        return bound

    def reach(self, state: dict[str, Tensor], level: float) -> Reach | None:
        """See `Criterion.reach`."""
        return Reach("cett", level, ErrorTable.from_state(state).at(level)[1]) if level else None

    def thresholds(self, level: float) -> Tensor:
        """See `Quantile.thresholds`."""
        epsilon, _ = self._table.at(level)
        return by_channel(self.norms.new_tensor(epsilon), self.norms)
