"""WINA: top-k of a linear map's inputs, weighted by the columns that they meet."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

from sparsity_atlas.criteria.topk import TopK

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.place import Place


class Wina(TopK):
    """Keep the k = ⌊level · width⌋ largest |x_j| · ‖W[:, j]‖₂ of each row, and their ties.

    WINA (arXiv 2505.19427) without its rotation of the weights: W is what reads x, one matrix above
    the other where several maps do. The level is the kept share, the same in every layer.
    """

    sites = ("input", "intermediate", "all_inputs")

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = copy.copy(self)
        bound._norms = place.column_norms().double()
        return bound

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        # A product of two float32 is exact in float64, so that weights alone make no new ties.
        return super().mask(values.double() * self._norms, level)
