"""Drop what each expert's own rule drops of its own rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch

from sparsity_atlas.criteria.base import Criterion, keeps_by_threshold
from sparsity_atlas.kernels import Masked, grouped

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.expert_rules import ExpertRules
    from sparsity_atlas.kernels.grouped import Thresholds
    from sparsity_atlas.sites.part import Spread


class Drop(Protocol):
    """Drops of a tensor what a criterion drops of another; see `kernels.masked`."""

    def __call__(self, values: Tensor, onto: Tensor, spread: Spread | None = None, /) -> Masked:
        """Drop.

        Args:
            values: [..., width], what the criterion looks at.
            onto: of the same shape and type, what is to be masked.
            spread: which expert each row belongs to, where they are rows of several.
        """


def dropping_of_each(
    criterion: ExpertRules, level: float, dropping: Callable[[Criterion], Drop]
) -> Drop:
    """What the rules of all experts do at a level.

    Thresholds that differ in weights and constants alone go over all rows at once. Of all others each
    expert's rows are taken by themselves: to know where they end, each place waits for the device once a
    forward pass.

    Args:
        criterion: the rules.
        level: of all of them.
        dropping: what one of them does.
    """
    rules = criterion.rules
    drops = [dropping(rule) for rule in rules]

    @cache
    def joined(width: int, device: torch.device) -> Thresholds | None:
        if not all(map(keeps_by_threshold, rules)):
            return None
        return grouped.joined([rule.threshold(level, width).to(device) for rule in rules])

    def drop(values: Tensor, onto: Tensor, spread: Spread | None = None, /) -> Masked:
        assert spread is not None, "rows of experts come with the expert of each"
        together = joined(values.shape[-1], values.device)
        if together is not None:
            return grouped.masked(together, values, onto, spread.experts)
        return _by_slices(drops, values, onto, spread.offsets.tolist())

    return drop


def _by_slices(drops: list[Drop], values: Tensor, onto: Tensor, ends: list[int]) -> Masked:
    """Each expert's rows by its own rule."""
    out = torch.empty_like(onto)
    zeros = torch.empty(len(values), dtype=torch.int64, device=values.device)
    finite = torch.empty(len(values), dtype=torch.bool, device=values.device)
    masks: list[Tensor] = []
    start = 0
    for drop, end in zip(drops, ends, strict=True):
        if start < end:
            rows = values[start:end]
            made = drop(rows, rows if onto is values else onto[start:end])
            out[start:end], zeros[start:end], finite[start:end] = made[:3]
            masks += [] if made.mask is None else [made.mask]
        start = end
    # The experts' rules are of one kind: all make masks, or none does.
    return Masked(out, zeros, finite, torch.cat(masks) if masks else None)
