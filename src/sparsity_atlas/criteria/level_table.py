"""Calibrated thresholds: one table for all levels of a criterion."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Levels that the table holds by themselves; between two of them a threshold is interpolated.
STEPS = 10_000
# Target sparsities that a place's own ones are given for, where an allocation spreads them unevenly.
TARGETS = np.linspace(0, 1, 101)


def quantile_table(scores: Tensor) -> Tensor:
    """Thresholds that drop a share k / STEPS of some scores, k = 0 ... STEPS: float32 [STEPS + 1].

    A share s of n scores lies below the one of rank ⌊s · n⌋, counted from 0 (fewer where it ties
    with smaller ones). The first threshold is 0, which drops nothing; the last drops everything.

    Args:
        scores: any shape, not negative.
    """
    ranked = np.sort(scores.flatten().float().cpu().numpy())
    index = np.arange(STEPS) * len(ranked) // STEPS
    table = np.append(ranked[index], np.float32(np.inf))
    table[0] = 0
    return torch.from_numpy(table)


def at_level(table: Tensor, level: float) -> Tensor:
    """The table's threshold at a level: float32 []."""
    place = level * STEPS
    # The decimal that the user wrote: 0.29 · 10,000 is 2899.9999999999995.
    below = round(place) if abs(place - round(place)) < 1e-6 else int(place)
    share = place - below
    if below == STEPS or share < 1e-6:
        return table[below]
    if below == STEPS - 1:
        # Towards the threshold that drops everything there is nothing to interpolate.
        return table[below]
    return torch.lerp(table[below], table[below + 1], share)


def share_dropped(table: Tensor, threshold: Tensor) -> float:
    """Share of the scores of a table that a threshold drops, or that are zeros; to a step of the table.

    Less than the level that the threshold was asked for where scores tie with it, more where zeros are more.
    """
    if torch.isinf(threshold):
        return 1.0
    inner = table[1:-1].contiguous()
    below = int(torch.searchsorted(inner, threshold.to(inner))) + 1 if threshold > 0 else 0
    return max(below, int((inner <= 0).sum())) / STEPS


def by_channel(threshold: Tensor, weights: Tensor) -> Tensor:
    """Thresholds of |v_j| that say the same as one threshold of |v_j| · weights_j.

    Args:
        threshold: [].
        weights: [width], not negative.

    Returns:
        [width]; a channel of weight 0 is dropped by every threshold above 0.
    """
    without = torch.where(threshold > 0, torch.inf, 0.0)
    return torch.where(weights > 0, threshold / weights, without)
