"""The L1 penalty of ProSparse (arXiv 2402.13516): on what the down projection reads, rising in stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.rectified import DReLUMLP


@dataclass(frozen=True)
class Stages:
    """The penalty's weight λ over a training.

    Attributes:
        points: (T_i, λ_i), steps and weights, the steps in order. Two at one step are a jump.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def parse(cls, spelled: list[str]) -> Self:
        """Of STEP:WEIGHT each.

        Raises:
            AtlasError: one is spelled otherwise, a weight is negative, or the steps fall.
        """
        points = []
        for word in spelled:
            step, _, weight = word.partition(":")
            try:
                points.append((int(step), float(weight)))
            except ValueError:
                raise AtlasError(
                    f"--l1: found '{word}', expected STEP:WEIGHT, as 4000:0.01"
                ) from None
            if points[-1][0] < 0 or not 0 <= points[-1][1] < math.inf:
                raise AtlasError(f"--l1: found '{word}', expected a step and a weight from 0")
        if any(later < earlier for (earlier, _), (later, _) in pairwise(points)):
            raise AtlasError(f"--l1: found {' '.join(spelled)}, expected steps that do not fall")
        return cls(tuple(points))

    def weight(self, step: int) -> float:
        """λ at a step: λ_{i−1} + η (λ_i − λ_{i−1}), η = ½ [sin(−π/2 + π (t − T_{i−1})/(T_i − T_{i−1})) + 1].

        Before the first point and behind the last one it is constant. ProSparse, equations 3 and 4.
        """
        if step < self.points[0][0]:
            return self.points[0][1]
        for (before, low), (after, high) in pairwise(self.points):
            if before <= step < after:
                risen = (
                    math.sin(-math.pi / 2 + math.pi * (step - before) / (after - before)) + 1
                ) / 2
                return low + risen * (high - low)
        return self.points[-1][1]

    def spelled(self) -> list[str]:
        """As `parse` reads them."""
        return [f"{step}:{weight:g}" for step, weight in self.points]


def intermediate(mlp: Any, x: Tensor) -> Tensor:
    """What the down projection of a Llama's or an Arcee's FFN reads.

    Args:
        mlp: the FFN: gated, or without `gate_proj`.
        x: [..., d].

    Returns:
        [..., d_ff].
    """
    u: Tensor = mlp.up_proj(x)
    if not hasattr(mlp, "gate_proj") or isinstance(mlp, DReLUMLP):
        u = mlp.act_fn(u)
    return mlp.act_fn(mlp.gate_proj(x)) * u if hasattr(mlp, "gate_proj") else u


def layer_pass(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One layer with causal attention, and the L1 norm of what its down projection reads.

    Args:
        layer: a `LlamaDecoderLayer`, or one with its modules.
        hidden: [batch, tokens, d].
        rotary: cosines and sines of the positions.

    Returns:
        [batch, tokens, d], and a scalar: the mean of ‖i‖₁ over tokens, in float32.
    """
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None
    )
    hidden = hidden + attended
    i = intermediate(layer.mlp, layer.post_attention_layernorm(hidden))
    return hidden + layer.mlp.down_proj(i), i.abs().sum(-1, dtype=torch.float32).mean()
