"""Thresholds that differ from group to group of rows, over all rows at once.

The scores of a row are |v_j| · weights_j with the weights of its group: rows that are multiplied by them
first have these scores without weights, so that one launch of the kernel serves all groups. The device is
never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.kernels import Masked
from sparsity_atlas.kernels.definition import Threshold


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds of one kind, amount and power, one for each group of rows.

    Attributes:
        rule: what they have in common, without weights; of kind `fixed`, the first of them.
        weights: float32 [groups, width]; None for 1.
        constants: float32 [groups, width] or [groups, 1]; only for `fixed`.
    """

    rule: Threshold
    weights: Tensor | None
    constants: Tensor | None

    def scores(self, values: Tensor, groups: Tensor) -> Tensor:
        """Values whose magnitudes are their scores, in float32.

        Args:
            values: [rows, width].
            groups: int [rows], the group of each row.
        """
        wide = values.float()
        return wide if self.weights is None else wide * self.weights[groups]


def joined(rules: Sequence[Threshold]) -> Thresholds | None:
    """One for all groups; None where they differ in more than weights and constants.

    Args:
        rules: of each group, with their tensors on one device.
    """
    first = rules[0]
    if any(
        (one.kind, one.amount, one.power) != (first.kind, first.amount, first.power)
        for one in rules
    ):
        return None
    weights = [one.weights for one in rules if one.weights is not None]
    constants = [one.constants for one in rules if one.constants is not None]
    if len(weights) not in (0, len(rules)):
        return None
    return Thresholds(
        replace(first, weights=None),
        torch.stack(weights) if weights else None,
        torch.stack(list(torch.broadcast_tensors(*constants))) if constants else None,
    )


def masked(rules: Thresholds, values: Tensor, onto: Tensor, groups: Tensor) -> Masked:
    """As `kernels.masked` with each group's own threshold, to the bit.

    Args:
        rules: with their tensors on the device of `values`.
        values: [rows, width].
        onto: of the same shape and type.
        groups: int [rows], the group of each row.
    """
    if rules.weights is None and rules.constants is None:
        return kernels.masked(rules.rule, values, onto)
    scores = rules.scores(values, groups)
    finite = kernels.finite(scores)
    if rules.constants is not None:
        mask = (scores.abs() >= rules.constants[groups]) | ~finite[:, None]
    else:
        mask = kernels.kept_of(rules.rule, scores)
    return kernels.by_mask(mask, values, onto)._replace(finite=finite)
