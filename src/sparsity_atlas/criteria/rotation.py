"""Top-k in another basis: what rules have in common that turn a vector before they look at it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import Threshold

if TYPE_CHECKING:
    from torch import Tensor


class Rotated(Criterion):
    """A rule of thresholds that is asked about Qᵀ v, and whose outcome is turned back.

    Stands before the rule itself among a criterion's bases. W Q stands for W in a model that is made for
    it: dropping entry j of Qᵀ v saves column j, so that zeros are counted in the turned vector. Turning
    costs nothing where what writes v can do it, which is the residual stream: hence the sites.
    """

    sites = ("input", "qkv_input")
    _basis: Tensor
    _weights: Tensor | None = None

    def turned(self, basis: Tensor, weights: Tensor | None = None) -> Self:
        """The rule for a place.

        Args:
            basis: Q, float32 [width, width], orthogonal; its columns are the new axes.
            weights: of the scores |(Qᵀ v)_j|, [width].
        """
        bound = copy.copy(self)
        bound._basis, bound._weights = basis, weights
        return bound

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`: of the entries of Qᵀ v."""
        rule = self.threshold(level, values.shape[-1])
        weighted = Threshold(rule.kind, rule.amount, rule.power, self._weights, rule.constants)
        return weighted.to(values.device).mask(values.float() @ self._basis)

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor:
        """See `Criterion.replace`: turned back. A vector of which nothing is dropped stays as it is."""
        kept = torch.where(mask, written.float() @ self._basis, 0) @ self._basis.T
        return torch.where(mask.all(-1, keepdim=True), written, kept.to(written.dtype))
