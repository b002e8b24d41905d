"""How much of what the down projections read is exactly zero."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsity_atlas.zoo.batches import IGNORED

_BLOCKS_AT_ONCE = 16


@torch.inference_mode()
def measure(model: PreTrainedModel, inputs: np.ndarray, targets: np.ndarray) -> list[float]:
    """The share of exact zeros in each layer's input of the down projection, by the model's own forward.

    Args:
        model: a Llama, or one with its modules.
        inputs: blocks of `evaluation_blocks`, int64 (N, context).
        targets: likewise; positions without a target do not count.
    """
    layers: Any = model.get_decoder().layers
    counts = torch.zeros(len(layers), dtype=torch.int64, device=model.device)
    valid = torch.empty(0)

    def count(layer: int, _: Any, arguments: tuple[Tensor]) -> None:
        counts[layer] += (arguments[0][valid] == 0).sum()

    model.eval()
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            hook = layer.mlp.down_proj.register_forward_pre_hook(partial(count, number))
            stack.callback(hook.remove)
        for first in range(0, len(inputs), _BLOCKS_AT_ONCE):
            part = slice(first, first + _BLOCKS_AT_ONCE)
            valid = torch.from_numpy(targets[part] != IGNORED).to(model.device)
            model(torch.from_numpy(inputs[part]).to(model.device), use_cache=False)
    entries = int((targets != IGNORED).sum()) * layers[0].mlp.down_proj.in_features
    return [int(zeros) / entries for zeros in counts]
