"""WINA with its rotation: top-k where the columns that the entries meet are orthogonal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.built_in.topk import TopK
from sparsity_atlas.criteria.place import relative
from sparsity_atlas.criteria.rotation import Rotated

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place


class RotatedWina(Rotated, TopK):
    """Keep the k = ⌊level · width⌋ largest |(Vᵀ x)_j| · S_j of each row, and turn what is kept back.

    W = U S Vᵀ is what reads x, one matrix above the other where several maps do. The columns of W V are
    orthogonal, with norms S: what is dropped then costs Σ ((Vᵀ x)_j S_j)², so that the rule drops what
    costs least (arXiv 2505.19427). WINA's code turns by the SVD of one of the maps (of `gate` or of the
    keys) and weighs by that alone. Induced sparsity is that of the turned vector. level = 1 changes
    nothing.
    """

    sites = ("input", "qkv_input")
    dense_level = 1.0
    coarse_levels = ("0.8", "0.6", "0.4", "0.2")
    looks_at_weights = True

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        # The eigenvectors of Wᵀ W are all of V, also where W has fewer rows than columns.
        weight = place.weight.double()
        squares, axes = torch.linalg.eigh(weight.T @ weight)
        norms = squares.clamp(min=0).sqrt().flip(-1).float()
        return self.turned(axes.flip(-1).float().contiguous(), relative(norms))
