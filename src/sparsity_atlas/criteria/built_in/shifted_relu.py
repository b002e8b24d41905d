"""Shifted ReLU: the gate's activation function gives way to ReLU(z − b)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.built_in.quantile import Quantile
from sparsity_atlas.criteria.level_table import quantile_table
from sparsity_atlas.sites.shaping import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample

# Halvings until float32 holds nothing finer.
HALVINGS = 40


class ShiftedRelu(Quantile):
    """g becomes ReLU(z − b) with z = W_g x (ReLU Strikes Back, arXiv 2310.04564), without fine-tuning.

    b ≥ 0 is the level-quantile of the layer's z over the calibration tokens, and 0 where that is
    negative. The level is the target sparsity (the paper's b = 1 drops about 95 %); below the share
    of negative z the rule is ReLU. z is read from g, of which it is a function where z > 0, for
    activations that grow there. level = 0 is the dense model, level = 1 drops everything.
    """

    sites = ("gate",)
    calibrated = True
    coarse_levels = ("0.5", "0.7", "0.9", "0.97")
    _function: Callable[[Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()

    def refuses(self, place: Place) -> str | None:
        """See `Criterion.refuses`."""
        if place.part.activation is None:
            return "its gate is a function of its own, of which no inverse is known"
        if place.part.activation.before != PLAIN:
            return "its gate is cut or bounded before the nonlinearity, which has no inverse"
        return super().refuses(place)

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        return {"table": quantile_table(sample.read("gate").clamp(min=0))}

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = super().bind(place, state)
        activation = place.part.activation
        assert activation is not None, "what has a gate has a nonlinearity"
        bound._function = activation.function
        return bound

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        if level == 0:
            return torch.ones_like(values, dtype=torch.bool)
        # ReLU of nothing is 0: what only reaches the threshold is dropped.
        return values.float() > self.thresholds(level)

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor | None:
        """See `Criterion.replace`."""
        if level == 0 or not mask.any():
            return None
        gate = torch.where(mask, values.float(), 1.0)
        threshold = self.thresholds(level)
        shift = inverse(self._function, threshold[None])
        ratio = (inverse(self._function, gate) - shift) / gate
        return torch.where(mask, (written.float() * ratio).to(written.dtype), 0)

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`; here g must exceed `threshold`, and `shift` is b, [].

        At level 0 every g does, -inf, and b is NaN: the activation function is the model's own.
        """
        threshold = self.thresholds(level)
        if level == 0:
            return {
                "threshold": torch.full_like(threshold, -torch.inf),
                "shift": torch.full_like(threshold, torch.nan),
            }
        finite = bool(torch.isfinite(threshold))
        shift = inverse(self._function, threshold[None])[0] if finite else threshold.clone()
        return {"threshold": threshold, "shift": shift}


def inverse(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """z ≥ 0 with function(z) = values, by bisection.

    Args:
        function: grows without bound where z > 0, from at most 0 at z = 0.
        values: finite, not negative.
    """
    low, high = torch.zeros_like(values), torch.ones_like(values)
    while (short := function(high) < values).any():
        high = torch.where(short, 2 * high, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = function(middle) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
