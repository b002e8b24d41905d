"""Training a mixture of experts: all experts in one product, an even load asked for, the load measured.

Which experts a token goes to is data, which a compiled pass waits for or pads. These experts are so small
that computing all of them and multiplying those without a say by zero is faster; the function is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM

from sparsity_atlas.zoo.batches import IGNORED

_BLOCKS_AT_ONCE = 16


def layer_pass(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One layer of OLMoE with causal attention, and how uneven its routing is.

    Args:
        layer: an `OlmoeDecoderLayer`.
        hidden: [batch, tokens, d].
        rotary: cosines and sines of the positions.

    Returns:
        [batch, tokens, d], and the scalar of `unevenness`.
    """
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None
    )
    hidden = hidden + attended
    x = layer.post_attention_layernorm(hidden)
    # Two experts that are nearly as probable must not be told apart by bfloat16's three digits.
    with torch.autocast(x.device.type, enabled=False):
        probabilities = functional.linear(x.float(), layer.mlp.gate.weight).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(
        -1, probabilities.topk(layer.mlp.gate.top_k, dim=-1).indices, 1.0
    )
    out = all_experts(layer.mlp.experts, x, probabilities * chosen)
    return hidden + out, unevenness(probabilities.flatten(0, -2), chosen.flatten(0, -2))


def all_experts(experts: Any, x: Tensor, weights: Tensor) -> Tensor:
    """Σ_e r_e W_d,e (u_e ⊙ σ(g_e)) over all experts, as one gated FFN of width E · w.

    Args:
        experts: an `OlmoeExperts`.
        x: [..., d].
        weights: r, [..., E], zero where a token does not go to an expert.

    Returns:
        [..., d].
    """
    count, _, width = experts.down_proj.shape
    z = functional.linear(x, experts.gate_up_proj.flatten(0, 1)).unflatten(-1, (count, 2, width))
    intermediate = experts.act_fn(z[..., 0, :]) * z[..., 1, :] * weights[..., None]
    return functional.linear(intermediate.flatten(-2), experts.down_proj.transpose(0, 1).flatten(1))


def unevenness(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """E Σ_e f_e P_e of one layer; K where all experts are met alike, at most E K.

    f_e is the share of tokens that go to expert e, P_e its mean probability. transformers' function, which
    averages f and P over layers first, forgives a layer what another one makes up for; as OLMoE was trained,
    each layer counts by itself. https://arxiv.org/abs/2101.03961, equations 4 to 6.

    Args:
        probabilities: the router's [N, E].
        chosen: 1 where a token goes to an expert, else 0, [N, E].
    """
    return probabilities.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum()


@torch.inference_mode()
def load(model: OlmoeForCausalLM, inputs: np.ndarray, targets: np.ndarray) -> list[list[float]]:
    """The share of a layer's tokens that go to each expert, layers by experts; each layer adds up to K.

    Args:
        model: the mixture, by its own forward pass.
        inputs: blocks of `evaluation_blocks`, int64 (N, context).
        targets: likewise; positions without a target do not count.
    """
    config: OlmoeConfig = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    model.eval()
    for first in range(0, len(inputs), _BLOCKS_AT_ONCE):
        part = slice(first, first + _BLOCKS_AT_ONCE)
        valid = torch.from_numpy(targets[part] != IGNORED).flatten()
        with _routing(model) as routed:
            model(torch.from_numpy(inputs[part]).to(model.device), use_cache=False)
        for layer, indices in enumerate(routed):
            met = indices.cpu()[valid].flatten()
            counts[layer] += torch.bincount(met, minlength=config.num_experts)
    return (counts / int((targets != IGNORED).sum())).tolist()


@contextmanager
def _routing(model: OlmoeForCausalLM) -> Iterator[list[Tensor]]:
    """Collect which experts each token goes to, (N, K) a layer, in the order of the layers."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for layer in model.model.layers:
            hook = layer.mlp.gate.register_forward_hook(
                lambda _, __, output: seen.append(output[2])
            )
            stack.callback(hook.remove)
        yield seen
