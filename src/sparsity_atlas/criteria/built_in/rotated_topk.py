"""Rotated top-k: top-k along the principal axes of a layer's activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.built_in.topk import TopK
from sparsity_atlas.criteria.rotation import Rotated

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample


class RotatedTopK(Rotated, TopK):
    """Keep the k = ⌊level · width⌋ largest |(Qᵀ v)_j| of each row, and turn what is kept back.

    Q are the eigenvectors of E[v vᵀ] over the calibration tokens, by layer, as of LaRoSa (arXiv
    2507.01299). Induced sparsity is that of the turned vector. level = 1 changes nothing.
    """

    sites = ("input", "qkv_input")
    dense_level = 1.0
    coarse_levels = ("0.8", "0.6", "0.4", "0.2")
    calibrated = True
    looks_at_weights = False

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        values = sample.read(place.tensor).double()
        axes = torch.linalg.eigh(values.T @ values).eigenvectors
        return {"basis": axes.flip(-1).float().contiguous()}

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        return self.turned(state["basis"])
