"""WINA: top-k of a linear map's inputs, weighted by the columns that they meet."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from sparsity_atlas.criteria.topk import TopK
from sparsity_atlas.place import relative

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.place import Place
    from sparsity_atlas.threshold import Threshold


class Wina(TopK):
    """Keep the k = ⌊level · width⌋ largest |x_j| · ‖W[:, j]‖₂ of each row, and their ties.

    WINA (arXiv 2505.19427) without its rotation of the weights: W is what reads x, one matrix above
    the other where several maps do. The level is the kept share, the same in every layer.
    """

    sites = ("input", "intermediate", "all_inputs")

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = copy.copy(self)
        bound._weights = relative(place.column_norms())
        return bound

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        return replace(super().threshold(level, width), weights=self._weights)
