"""Read and change the tensors of every layer's FFN while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.terms import LINEAR_INPUTS, SITES, STORED, TENSORS

Callback = Callable[[int, str, Tensor], None]
MaskOf = Callable[[int, str, Tensor], "Tensor | None"]
Rewrite = Callable[[int, str, Tensor, Tensor], "Tensor | None"]


def _tensors(ffns: Sequence[FFN], sites: Iterable[str]) -> set[str]:
    names: set[str] = set()
    for site in sites:
        if site not in SITES:
            raise AtlasError(f"unknown site '{site}'; known: {', '.join(SITES)}")
        for ffn in ffns:
            if site not in ffn.sites():
                raise AtlasError(
                    f"site '{site}': layer {ffn.layer} has none; "
                    f"its sites are {', '.join(ffn.sites())}"
                )
        names.update(TENSORS[site])
    return names


def find_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], place: str) -> int | str:
    """Where a module's one input tensor stands: position or keyword."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, Tensor):
            return key
    raise AtlasError(f"{place}: called without a tensor")


def replace_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Tensor
) -> tuple[Any, ...]:
    if isinstance(key, str):
        return args, kwargs | {key: value}
    return (*args[:key], value, *args[key + 1 :]), kwargs


def _on_input(
    stack: ExitStack,
    forwards: ForwardWatch,
    ffn: FFN,
    name: str,
    act: Callable[[Tensor], Tensor | None],
) -> None:
    """Hook what goes into a projection: `act` sees it by token and may return a replacement.

    `input` goes into the up and the gate projection: `act` sees it once, both get the result. So does
    `qkv_input`, with up to three.
    """
    read_by = {place.path: place for place in ffn.readers(name)}.values()
    keys = {place.path: (ffn.layer, name, place.path) for place in read_by}
    forwards.counts.update(dict.fromkeys(keys.values(), 0))

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, path: str
    ) -> tuple[Any, ...] | None:
        first = not any(forwards.counts[key] for key in keys.values())
        forwards.fired(keys[path])
        where = find_tensor(args, kwargs, path)
        tensor = args[where] if isinstance(where, int) else kwargs[where]
        if first:
            result = act(forwards.by_token(tensor, path))
            if result is not None:
                forwards.kept[ffn.layer, name] = result
        result = forwards.kept.get((ffn.layer, name))
        if all(forwards.counts[key] for key in keys.values()):
            forwards.kept.pop((ffn.layer, name), None)
        if result is None:
            return None
        return replace_tensor(args, kwargs, where, result.reshape(tensor.shape))

    for place in read_by:
        handle = place.module.register_forward_pre_hook(
            partial(hook, path=place.path), with_kwargs=True
        )
        stack.callback(handle.remove)


def _on_factor(
    stack: ExitStack,
    forwards: ForwardWatch,
    ffn: FFN,
    name: str,
    act: Callable[[Tensor], None],
) -> None:
    """Hook where a factor is made: `act` sees u, or g after the nonlinearity, by token."""
    activation = ffn.activation
    if name == "up":
        module, path, value = ffn.up.module, ffn.up.path, ffn.up.columns
    elif activation.module is not None:
        module, path, value = activation.module, str(activation.path), None
    else:
        assert ffn.gate is not None
        columns = ffn.gate.columns
        module, path = ffn.gate.module, ffn.gate.path

        def value(output: Tensor) -> Tensor:
            return activation.function(columns(output))

    key = (ffn.layer, name, path)
    forwards.counts[key] = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        forwards.fired(key)
        act(forwards.by_token(output if value is None else value(output), path))

    stack.callback(module.register_forward_hook(hook).remove)


@contextmanager
def observe(ffns: Sequence[FFN], sites: Iterable[str], callback: Callback) -> Iterator[None]:
    """Show the tensors of some sites, as the model makes them, without changing anything.

    Args:
        ffns: all FFNs of one model.
        sites: any of `SITES`; each tensor is shown once, however many of them name it.
        callback: called with layer, tensor name (one of `STORED`) and the tensor [batch, tokens, width],
            in the order of the forward pass. The tensor is the model's own: copy what is to be kept,
            change nothing.

    Raises:
        AtlasError: a site that an FFN does not have; from a forward pass of the model in which a
            tensor of some layer did not come by exactly once.
    """
    names = _tensors(ffns, [sites] if isinstance(sites, str) else sites)
    with ExitStack() as stack:
        forwards = ForwardWatch(ffns[0].model, stack)
        for ffn in ffns:
            for name in STORED:
                if name in names:
                    attach = _on_input if name in LINEAR_INPUTS else _on_factor
                    attach(stack, forwards, ffn, name, partial(callback, ffn.layer, name))
        yield


@contextmanager
def intercept(ffns: Sequence[FFN], site: str, rewrite: Rewrite) -> Iterator[None]:
    """Replace what the FFNs compute with, at one site: the general form of `transform`.

    Zeroing entries of u or of g zeroes the same entries of i = u ⊙ g. So only x and i are ever
    written: for `input` before the up and gate projections, else before the down projection.

    Args:
        ffns: all FFNs of one model.
        site: one of `SITES`.
        rewrite: called once a layer and tensor with layer, tensor name, the tensor that the site
            means and the tensor to write (i for `up` and `gate`, for the others the same one), both
            [batch, tokens, width]. Returns the replacement, of the same shape and type, or None for no
            change. It must not write in place: x has other readers.

    Raises:
        AtlasError: as `observe`.
    """
    names = _tensors(ffns, [site])
    with ExitStack() as stack:
        forwards = ForwardWatch(ffns[0].model, stack)
        for ffn in ffns:
            for name in names:
                _attach_rewrite(stack, forwards, ffn, name, rewrite)
        yield


def _attach_rewrite(
    stack: ExitStack, forwards: ForwardWatch, ffn: FFN, name: str, rewrite: Rewrite
) -> None:
    if name in LINEAR_INPUTS:
        act = partial(_call_same, rewrite, ffn.layer, name)
        return _on_input(stack, forwards, ffn, name, act)

    def keep(factor: Tensor) -> None:
        forwards.kept[ffn.layer, name] = factor.clone() if ffn.overwritten else factor

    def write(i: Tensor) -> Tensor | None:
        factor = forwards.kept.pop((ffn.layer, name), None)
        # A missing factor is reported, by name, at the end of the pass.
        return None if factor is None else rewrite(ffn.layer, name, factor, i)

    _on_factor(stack, forwards, ffn, name, keep)
    return _on_input(stack, forwards, ffn, "intermediate", write)


def _call_same(rewrite: Rewrite, layer: int, name: str, tensor: Tensor) -> Tensor | None:
    return rewrite(layer, name, tensor, tensor)


@contextmanager
def transform(ffns: Sequence[FFN], site: str, mask_of: MaskOf) -> Iterator[None]:
    """Zero entries at one site of all FFNs.

    Args:
        ffns: all FFNs of one model.
        site: one of `SITES`; `all_inputs` masks x, and then the i that follows from it.
        mask_of: called with layer, tensor name and tensor [batch, tokens, width]; returns a bool
            mask of the same shape, True = keep, or None to keep everything. Entries masked out
            become exact zeros, NaN and infinities included; kept ones keep every bit.

    Raises:
        AtlasError: as `observe`, or a mask that is not bool or not of the tensor's shape.
    """

    def rewrite(layer: int, name: str, read: Tensor, write: Tensor) -> Tensor | None:
        mask = mask_of(layer, name, read)
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape != read.shape:
            raise AtlasError(
                f"layer {layer}: {name}: found a mask of type {mask.dtype} and shape "
                f"{list(mask.shape)}, expected torch.bool and {list(read.shape)}"
            )
        return torch.where(mask, write, 0)

    with intercept(ffns, site, rewrite):
        yield
