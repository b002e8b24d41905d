"""Llamas of known shapes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Layers, hidden width, FFN, heads, those of keys and values, vocabulary.
SHAPES = {
    "1b": (16, 2048, 8192, 32, 8, 128256),
    "8b": (32, 4096, 14336, 32, 8, 128256),
    "tiny": (2, 64, 128, 4, 2, 1000),
}


def random_llama(name: str, device: str, dtype: torch.dtype, **settings: Any) -> LlamaForCausalLM:
    """A model of a shape, the same at each call, in evaluation mode.

    Args:
        name: of `SHAPES`.
        device: where it is made.
        dtype: of its numbers.
        settings: further ones of its configuration.
    """
    layers, hidden, width, heads, groups, vocabulary = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **settings,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()
