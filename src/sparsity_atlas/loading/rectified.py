"""Rectified FFNs that transformers has no word for: FATReLU, and ReLU on both factors (dReLU).

A checkpoint says FATReLU as the published ProSparse ones do: `hidden_act` is `fatrelu`, and its threshold is
`hidden_act_param`. One with ReLU on both factors is of model type `drelu_llama`: under `llama` it would load
anywhere, and compute something else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)
from transformers.activations import ACT2FN

from sparsity_atlas.errors import AtlasError

FATRELU = "fatrelu"
THRESHOLD = "hidden_act_param"


class FATReLU(nn.Module):
    """x where x ≥ t, else 0 (ProSparse, arXiv 2402.13516); t = 0 is ReLU.

    Args:
        threshold: t.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape, thresholded; what ties with t is kept."""
        return torch.where(values >= self.threshold, values, 0)

    def extra_repr(self) -> str:
        """The threshold."""
        return f"threshold={self.threshold}"


class DReLUMLP(nn.Module):
    """W_d(ReLU(W_u x) ⊙ ReLU(W_g x)), as in TurboSparse (arXiv 2406.05955).

    Args:
        gated: the gated FFN whose maps these are.
    """

    def __init__(self, gated: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            gated.gate_proj,
            gated.up_proj,
            gated.down_proj,
        )
        self.act_fn = gated.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Of x [..., d], [..., d]."""
        output: Tensor = self.down_proj(
            self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x))
        )
        return output


class DReLULlamaConfig(LlamaConfig):
    """A Llama's, but for the type."""

    model_type = "drelu_llama"


class DReLULlamaForCausalLM(LlamaForCausalLM):
    """A Llama whose FFNs are `DReLUMLP`; its tensors have a Llama's names."""

    config_class = DReLULlamaConfig

    def __init__(self, config: DReLULlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = DReLUMLP(layer.mlp)


AutoConfig.register(DReLULlamaConfig.model_type, DReLULlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(DReLULlamaConfig, DReLULlamaForCausalLM, exist_ok=True)


def with_fatrelu(config: PretrainedConfig, where: Path) -> PretrainedConfig:
    """The configuration, with a `hidden_act` under which transformers finds the nonlinearity.

    Args:
        config: changed in place, unless it is of a checkpoint's own code, which knows what it means.
        where: its folder, for errors.

    Raises:
        AtlasError: it says FATReLU without a threshold.
    """
    own_code = type(config).__module__.partition(".")[0] not in ("transformers", "sparsity_atlas")
    if getattr(config, "hidden_act", None) == FATRELU and not own_code:
        threshold: Any = getattr(config, THRESHOLD, None)
        # Not a boolean, which is an integer.
        if type(threshold) not in (float, int) or not 0 <= threshold < math.inf:
            raise AtlasError(
                f"{where}/config.json: {THRESHOLD}: found {threshold}, expected the threshold of "
                f"{FATRELU}, a number from 0"
            )
        # Of its own for each threshold: a process may hold several such models.
        name = f"{FATRELU}_{threshold:g}"
        ACT2FN[name] = (FATReLU, {"threshold": float(threshold)})
        config.hidden_act = name
    return config
