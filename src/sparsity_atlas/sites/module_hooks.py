"""Hooks on a part's modules, checked by a `ForwardWatch` to run once in each forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import PlaceKey


def find_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], place: str) -> int | str:
    """Where a module's one input tensor stands: position or keyword."""
    if args and isinstance(args[0], Tensor):
        return 0
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, Tensor):
            return key
    raise AtlasError(f"{place}: called without a tensor")


def replace_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Tensor
) -> tuple[Any, ...]:
    """A module's arguments with another tensor at `key`."""
    if isinstance(key, str):
        return args, kwargs | {key: value}
    return (*args[:key], value, *args[key + 1 :]), kwargs


def on_input(
    stack: ExitStack,
    forwards: ForwardWatch,
    key: PlaceKey,
    readers: tuple[Projection, ...],
    act: Callable[[Tensor], Tensor | None],
) -> None:
    """Hook what goes into projections: `act` sees it by token and may return a replacement.

    `input` goes into the up and the gate projection: `act` sees it once, both get the result. So does
    `qkv_input`, with up to three.
    """
    read_by = {place.path: place for place in readers}.values()
    keys = [(key, place.path) for place in read_by]
    forwards.counts.update(dict.fromkeys(keys, 0))

    def hook(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        own: tuple[PlaceKey, str],
    ) -> tuple[Any, ...] | None:
        # A forward pass over few tokens waits for what is done here, at each site of each layer.
        counts = forwards.counts
        first = not any([counts[one] for one in keys])
        forwards.fired(own)
        where = find_tensor(args, kwargs, own[1])
        tensor = args[where] if isinstance(where, int) else kwargs[where]
        if first:
            result = act(forwards.by_token(tensor, own[1]))
            if result is not None:
                forwards.kept[key] = result
        if not forwards.kept:
            return None
        result = forwards.kept.get(key)
        if all([counts[one] for one in keys]):
            forwards.kept.pop(key, None)
        if result is None:
            return None
        return replace_tensor(args, kwargs, where, result.reshape(tensor.shape))

    for place, one in zip(read_by, keys, strict=True):
        handle = place.module.register_forward_pre_hook(partial(hook, own=one), with_kwargs=True)
        stack.callback(handle.remove)


def on_output(
    stack: ExitStack,
    forwards: ForwardWatch,
    key: PlaceKey,
    maker: Projection,
    value: Callable[[Tensor], Tensor],
    act: Callable[[Tensor], None],
) -> None:
    """Hook what a module makes: `act` sees the `value` of its output by token."""
    counted = (key, maker.path)
    forwards.counts[counted] = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        forwards.fired(counted)
        act(forwards.by_token(value(output), maker.path))

    stack.callback(maker.module.register_forward_hook(hook).remove)
