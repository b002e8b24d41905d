"""R-Sparse: what is dropped goes through a low-rank part of the weights."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.built_in.quantile import Quantile
from sparsity_atlas.criteria.level_table import by_channel, quantile_table
from sparsity_atlas.kernels.definition import decimal

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample


class RSparse(Quantile):
    """W (m ⊙ x) + W_r ((1 − m) ⊙ x), with W_r the rank-r part of W's SVD (arXiv 2504.19449).

    m keeps |x_j| · ‖W[:, j]‖₂ ≥ t. The level s leaves a budget of 1 − s of the map's weights:
    a share α = `sparse_share` of it for the kept entries, 1 − (1 − s) α of which are dropped, and
    the rest for the rank, r = ⌊(1 − s) (1 − α) · in · out / (in + out)⌋. Induced sparsity counts
    dropped entries, so that it exceeds s: the low-rank part is not free. α is one number, where the
    paper searches for it layer by layer; of several maps that read x, W is one above the other.
    level = 0 is the dense map, level = 1 drops everything.
    """

    sites = ("input", "intermediate", "all_inputs", "qkv_input", "o_input", "all_linear_inputs")
    calibrated = True
    looks_at_weights = True
    not_in_experts = "it would keep a low-rank part of the weights of each expert"
    _shape: torch.Size

    def __init__(self, sparse_share: float = 0.9) -> None:
        number = isinstance(sparse_share, int | float) and not isinstance(sparse_share, bool)
        if not number or not 0 < sparse_share <= 1:
            raise ValueError(
                f"sparse_share: expected a number above 0 and at most 1, found {sparse_share!r}"
            )
        super().__init__()
        self.sparse_share = float(sparse_share)

    def _rank(self, shape: torch.Size, level: float) -> int:
        outputs, inputs = shape
        whole = Fraction(inputs * outputs, inputs + outputs)
        # Rounded down, as in the paper's code: a budget is not exceeded by a part of a rank.
        return math.floor((1 - decimal(level)) * (1 - decimal(self.sparse_share)) * whole)

    def _basis(self, level: float) -> Tensor:
        return self._state["basis"][: self._rank(self._shape, level)]

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        scores = sample.read(place.tensor).abs() * place.column_norms()
        # W_r = W V_r V_rᵀ: the low-rank part is a projection of its input.
        right = torch.linalg.svd(place.weight, full_matrices=False).Vh
        return {
            "table": quantile_table(scores),
            "basis": right[: self._rank(place.weight.shape, 0.0)],
        }

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = super().bind(place, {**state, "norms": place.column_norms()})
        bound._shape = place.weight.shape
        return bound

    def thresholds(self, level: float) -> Tensor:
        """See `Quantile.thresholds`."""
        return by_channel(self._threshold(self._asked(level)), self._state["norms"])

    def _asked(self, level: float) -> float:
        return 0.0 if level == 0 else 1 - (1 - level) * self.sparse_share

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor:
        """See `Criterion.replace`."""
        basis = self._basis(level)
        dropped = torch.where(mask, 0, written).float()
        projected = (dropped @ basis.T) @ basis
        return torch.where(mask, written, 0) + projected.to(written.dtype)

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`; `basis` is V_rᵀ, [rank, width]."""
        return {**super().export(level), "basis": self._basis(level)}
