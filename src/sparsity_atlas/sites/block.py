"""A whole block of a decoder, attention and FFN, run by itself with what its linear maps read sparsified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.module_hooks import find_tensor, replace_tensor
from sparsity_atlas.sites.part import Part, by_layer
from sparsity_atlas.terms import PlaceKey


@dataclass(frozen=True)
class Block:
    """A layer's module, and what the model called it with: its input, masks, positions."""

    parts: Sequence[Part]
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self, drops: Mapping[PlaceKey, Callable[[Tensor], Tensor]]) -> Tensor:
        """The block's output [batch, tokens, hidden].

        Args:
            drops: by place, what becomes of it [batch, tokens, width]; all its readers get the result.
        """
        named = {part.name: part for part in self.parts}
        with ExitStack() as stack:
            for place, drop in drops.items():
                readers = named[place.part].readers(place.tensor)
                for reader in {one.path: one for one in readers}.values():
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


def blocks(parts: Sequence[Part], ids: Tensor) -> list[Block]:
    """The block of every layer, as one forward pass of the model calls it.

    Args:
        parts: all of one model.
        ids: int64 [sequences, positions], on the model's device.

    Raises:
        AtlasError: a layer has no module of its own, or it did not run once.
    """
    model = parts[0].model
    layers = by_layer(parts)
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {layer: [] for layer in layers}
    modules = {layer: model.get_submodule(layer_path(layer, parts)) for layer in layers}
    with torch.no_grad(), ExitStack() as stack:
        for own, module in modules.items():

            def note(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                layer: int = own,
            ) -> None:
                calls[layer].append((args, kwargs))

            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        model(input_ids=ids, use_cache=False)
    for layer, made in calls.items():
        if len(made) != 1:
            raise AtlasError(f"layer {layer}: its module ran {len(made)} times in a forward pass")
    return [Block(layers[layer], modules[layer], *made[0]) for layer, made in calls.items()]


def layer_path(layer: int, parts: Iterable[Part]) -> str:
    """The largest module around a layer's parts that holds no other's. Empty if there is none.

    It is a member of a list of modules, where there is one that is.
    """
    own: list[str] = []
    others: list[str] = []
    for part in parts:
        (own if part.layer == layer else others).extend(part.paths)
        model = part.model
    steps = own[0].split(".")
    around = [".".join(steps[:count]) for count in range(1, len(steps))]
    alone = [place for place in around if not any(path.startswith(f"{place}.") for path in others)]
    listed = (
        place
        for place in alone
        if isinstance(model.get_submodule(place.rpartition(".")[0]), nn.ModuleList)
    )
    return next(listed, next(iter(alone), ""))
