"""R-Sparse: what is dropped goes through a low-rank part of the weights."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from sparsity_atlas.criteria.built_in.quantile import Quantile
from sparsity_atlas.criteria.level_table import at_level, by_channel, quantile_table
from sparsity_atlas.kernels.definition import decimal

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample
    from sparsity_atlas.criteria.reach import Reach

SEARCHED = "searched"
# Where α is searched for, and among what; between two of these levels it is interpolated.
LEVELS = np.linspace(0.1, 0.9, 9)
SHARES = np.linspace(1.0, 0.05, 20)
# Tokens, spread over the calibration's, that a search goes by.
TOKENS = 1024


class RSparse(Quantile):
    """W (m ⊙ x) + W_r ((1 − m) ⊙ x), with W_r the rank-r part of W's SVD (arXiv 2504.19449).

    m keeps |x_j| · ‖W[:, j]‖₂ ≥ t. The level s leaves a budget of 1 − s of the map's weights:
    a share α = `sparse_share` of it for the kept entries, 1 − (1 − s) α of which are dropped, and
    the rest for the rank, r = ⌊(1 − s) (1 − α) · in · out / (in + out)⌋. Induced sparsity counts
    dropped entries, so that it exceeds s: the low-rank part is not free. Of several maps that read x, W is
    one above the other. level = 0 is the dense map, level = 1 drops everything.

    α is one number, or `searched`: of each place and level the one of `SHARES` whose output errs least,
    Σ ‖W x − what comes of it‖² over the calibration's tokens. The paper searches for one α by layer and map
    with an evolution that goes by the model's loss.
    """

    sites = ("input", "intermediate", "all_inputs", "qkv_input", "o_input", "all_linear_inputs")
    calibrated = True
    looks_at_weights = True
    not_in_experts = "it would keep a low-rank part of the weights of each expert"
    _shape: torch.Size

    def __init__(self, sparse_share: float | str = 0.9) -> None:
        number = isinstance(sparse_share, int | float) and not isinstance(sparse_share, bool)
        if sparse_share != SEARCHED and not (number and 0 < float(sparse_share) <= 1):
            raise ValueError(
                f"sparse_share: expected a number above 0 and at most 1, or {SEARCHED}, found "
                f"{sparse_share!r}"
            )
        super().__init__()
        self.sparse_share = None if sparse_share == SEARCHED else float(sparse_share)

    def share(self, level: float) -> Fraction:
        """α at a level."""
        if self.sparse_share is not None:
            return decimal(self.sparse_share)
        return _spelled(float(np.interp(level, LEVELS, self._state["shares"].cpu().numpy())))

    def _rank(self, shape: torch.Size, level: float) -> int:
        return rank(shape, level, self.share(level))

    def _basis(self, level: float) -> Tensor:
        return self._state["basis"][: self._rank(self._shape, level)]

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        values, norms = sample.read(place.tensor), place.column_norms()
        table = quantile_table(values.abs() * norms)
        # W_r = W V_r V_rᵀ: the low-rank part is a projection of its input.
        _, singular, right = torch.linalg.svd(place.weight, full_matrices=False)
        if self.sparse_share is not None:
            return {"table": table, "basis": right[: self._rank(place.weight.shape, 0.0)]}
        shape = place.weight.shape
        found = errors(
            values[:: -(-len(values) // TOKENS)],
            *(norms, table, singular[:, None] * right),
            lambda level, share: rank(shape, level, share),
        )
        shares = SHARES[found.argmin(1)]
        # Between two levels no rank is higher than that of the lower one with the smaller of both shares.
        least = np.minimum(shares, np.append(shares[1:], shares[-1]))
        highest = max(
            rank(shape, level, _spelled(share))
            for level, share in zip([0.0, *LEVELS], [shares[0], *least], strict=True)
        )
        return {
            "table": table,
            "basis": right[:highest],
            "shares": torch.from_numpy(shares).float(),
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
        return 0.0 if level == 0 else 1 - (1 - level) * float(self.share(level))

    def reach(self, state: dict[str, Tensor], level: float) -> Reach | None:
        """See `Criterion.reach`."""
        there = copy.copy(self)
        there._state = state
        return super(RSparse, there).reach(state, level)

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor:
        """See `Criterion.replace`."""
        basis = self._basis(level)
        dropped = torch.where(mask, 0, written).float()
        projected = (dropped @ basis.T) @ basis
        return torch.where(mask, written, 0) + projected.to(written.dtype)

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`; `basis` is V_rᵀ, [rank, width]."""
        return {**super().export(level), "basis": self._basis(level)}


def rank(shape: torch.Size, level: float, share: Fraction) -> int:
    """The rank that a level leaves beside a share of its budget.

    Args:
        shape: of the weight, [outputs, inputs].
        level: from 0, dense, to 1.
        share: of the budget that kept entries have.
    """
    outputs, inputs = shape
    whole = Fraction(inputs * outputs, inputs + outputs)
    # Rounded down, as in the paper's code: a budget is not exceeded by a part of a rank.
    return math.floor((1 - decimal(level)) * (1 - share) * whole)


def errors(
    values: Tensor,
    norms: Tensor,
    table: Tensor,
    components: Tensor,
    ranks: Callable[[float, Fraction], int],
) -> np.ndarray:
    """Σ ‖W x − what comes of it‖² over some rows, by level and share: [LEVELS, SHARES].

    With d what is dropped of x, the error is W d − W_r d, whose square is that of S Vᵀ d behind the first r
    components.

    Args:
        values: [rows, width].
        norms: of W's columns.
        table: of thresholds of the scores, see `quantile_table`.
        components: S Vᵀ of W, [components, width].
        ranks: r of a level and a share.
    """
    found = np.empty((len(LEVELS), len(SHARES)))
    for row, level in enumerate(LEVELS.tolist()):
        for column, share in enumerate(SHARES.tolist()):
            limits = by_channel(at_level(table, 1 - (1 - level) * share), norms)
            dropped = torch.where(values.abs() >= limits, 0, values)
            squares = (dropped @ components.T).square().double().sum(0)
            found[row, column] = float(squares[ranks(level, _spelled(share)) :].sum())
    return found


def _spelled(share: float) -> Fraction:
    """A share as a decimal, so that ranks are rounded down as those of a user's number are."""
    return decimal(round(share, 6))
