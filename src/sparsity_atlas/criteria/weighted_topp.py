"""Weighted top-p: top-p of the neurons' outputs in place of their activations."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from sparsity_atlas.criteria.topp import TopP
from sparsity_atlas.place import relative

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.place import Place
    from sparsity_atlas.threshold import Threshold


class WeightedTopP(TopP):
    """Keep the largest |v_j| · ‖W_d[:, j]‖₂ until they hold a share p of the row's sum.

    The product is the norm of what neuron j adds to the FFN's output where v is the intermediate
    (Sparsing Law, arXiv 2411.02335, measures neurons so). Otherwise as top-p, its ends included.
    """

    sites = ("up", "gate", "intermediate")

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = copy.copy(self)
        bound._weights = relative(place.column_norms())
        return bound

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        return replace(super().threshold(level, width), weights=self._weights)
