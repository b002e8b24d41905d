"""A whole block of a decoder, attention and FFN, run by itself with what its linear maps read sparsified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.ffn import FFN, layer_path
from sparsity_atlas.sites.hooks import find_tensor, replace_tensor


@dataclass(frozen=True)
class Block:
    """A layer's module, and what the model called it with: its input, masks, positions."""

    ffn: FFN
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self, drops: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """The block's output [batch, tokens, hidden].

        Args:
            drops: by tensor, what becomes of it [batch, tokens, width]; all its readers get the result.
        """
        with ExitStack() as stack:
            for tensor, drop in drops.items():
                for reader in {one.path: one for one in self.ffn.readers(tensor)}.values():
                    handle = reader.module.register_forward_pre_hook(
                        _replacing(drop, reader.path), with_kwargs=True
                    )
                    stack.callback(handle.remove)
            result = self.module.forward(*self.args, **self.kwargs)
        return result if isinstance(result, Tensor) else result[0]


def _replacing(drop: Callable[[Tensor], Tensor], path: str) -> Callable[..., tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        where = find_tensor(args, kwargs, path)
        tensor = args[where] if isinstance(where, int) else kwargs[where]
        return replace_tensor(args, kwargs, where, drop(tensor))

    return hook


def blocks(ffns: Sequence[FFN], ids: Tensor) -> list[Block]:
    """The block of every FFN, as one forward pass of the model calls it.

    Args:
        ffns: all FFNs of one model.
        ids: int64 [sequences, positions], on the model's device.

    Raises:
        AtlasError: a layer has no module of its own, or it did not run once.
    """
    model = ffns[0].model
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {ffn.layer: [] for ffn in ffns}
    modules = {}
    with torch.no_grad(), ExitStack() as stack:
        for ffn in ffns:
            path = layer_path(ffn, ffns)
            modules[ffn.layer] = model.get_submodule(path)

            def note(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                layer: int = ffn.layer,
            ) -> None:
                calls[layer].append((args, kwargs))

            handle = modules[ffn.layer].register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        model(input_ids=ids, use_cache=False)
    for layer, made in calls.items():
        if len(made) != 1:
            raise AtlasError(f"layer {layer}: its module ran {len(made)} times in a forward pass")
    return [Block(ffn, modules[ffn.layer], *calls[ffn.layer][0]) for ffn in ffns]
