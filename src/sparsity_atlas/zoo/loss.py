"""The loss of a saved model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from sparsity_atlas.zoo.batches import IGNORED

_BLOCKS_AT_ONCE = 16


@dataclass(frozen=True)
class Loss:
    """Total cross entropy in nats over `tokens` tokens that spell `text_bytes` bytes of UTF-8."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean cross entropy; its exponential is the perplexity."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The same text's cost without the tokenizer's say in it."""
        return self.nats / math.log(2) / self.text_bytes


@torch.inference_mode()
def measure(
    model: PreTrainedModel, inputs: np.ndarray, targets: np.ndarray, token_bytes: np.ndarray
) -> Loss:
    """Loss over blocks (N, context) of `evaluation_blocks`, in the model's own precision.

    `token_bytes` (V,) holds the bytes of each token.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for first in range(0, len(inputs), _BLOCKS_AT_ONCE):
        part = slice(first, first + _BLOCKS_AT_ONCE)
        logits = model(torch.from_numpy(inputs[part]).to(model.device), use_cache=False).logits
        wanted = torch.from_numpy(targets[part]).to(model.device)
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        )
        total += losses.double().sum()
    predicted = targets[targets != IGNORED]
    return Loss(float(total), int(predicted.size), int(token_bytes[predicted].sum()))
