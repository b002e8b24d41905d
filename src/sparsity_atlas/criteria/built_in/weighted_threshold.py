"""Weighted threshold: one norm of what a neuron adds, for the whole model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import Threshold, rounded_up

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place


class WeightedThreshold(Criterion):
    """Keep |v_j| · ‖W_d[:, j]‖₂ ≥ ε, with one ε for all layers.

    At the intermediate this is the threshold truncation of arXiv 2405.09274 with its universal ε: the
    product is the norm of what neuron j adds to the FFN's output. `cett` finds an ε for each layer
    instead. The level is ε, in the unit of the residual stream. level = 0 changes nothing.
    """

    sites = ("up", "gate", "intermediate")
    highest = 1000.0
    dense_level = 0.0
    coarse_levels = ("0.01", "0.03", "0.1", "0.3")
    looks_at_weights = True
    _norms: Tensor

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = copy.copy(self)
        bound._norms = place.column_norms()
        return bound

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        least = rounded_up(torch.tensor([level], dtype=torch.float64))
        return Threshold("fixed", constants=least, weights=self._norms)
