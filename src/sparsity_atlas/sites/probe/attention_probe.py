"""Search for attention by experiment: number the outputs of the maps beside the FFN and see what follows.

One forward pass runs in which the output of every linear-like module of a layer, those of its FFN aside,
is replaced. A causal attention's first token sees itself alone: what the output map reads there are the
values of that token, entry by entry, so the first token of each map's output gets numbers that no two
entries share. Where each token sees all others, a second pass runs, over sequences of one token. Of other
tokens it reads means of the values that they see, whatever the weights are: the outputs there are random, and
no other map's happen to hold all those means between them. So a module is
the output map `o` if what it reads is made of another one's output in this way; that one makes the values,
and all modules that read the same tensor are the query, key and value maps. No name is looked at.

An attention that does more than this (a gate on its output, keys and values through a smaller space,
values that are normalised or shared between layers) has no such sites, nor has a layer with any other
linear map. A layer whose other maps are all in a mixer with a convolution has no attention, nor one without
such maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.attention import Attention
from sparsity_atlas.sites.probe.ffn_probe import linear_like
from sparsity_atlas.sites.probe.layers import mixes_by_convolution
from sparsity_atlas.sites.projection import Projection

# ±(1 + k/128), k from 0 to 127: exact in bfloat16.
_DIGITS = 256
# Of numbers between 1 and 2: what rounding a mean to bfloat16 explains.
_TOLERANCE = 0.02
# Mean distance of a later token's means from its own values: weights are not all on the token itself.
_MIXED = 0.05
# Entries that are looked up at once: most modules are refuted by the first of them.
_ROWS = 256


@dataclass
class _Call:
    """A module's input and the output that was put in: [batch, tokens, width]."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor


# Calls of each module in one pass, None for one that is not of one tensor by token.
_Calls = dict[str, list[_Call | None]]


@dataclass(frozen=True)
class Layer:
    """What is known of a layer.

    Attributes:
        path: of its module; empty where none holds it alone.
        own: paths of the modules of its FFN or its experts.
        experts: path of the module of experts, if it has one.
        count: how many experts that holds.
    """

    path: str
    own: frozenset[str]
    experts: str | None = None
    count: int | None = None


def find_attention(
    model: nn.Module,
    layers: Mapping[int, Layer],
    run: Callable[[], Any],
    shape: tuple[int, int],
    alone: Callable[[], Any] | None = None,
) -> tuple[list[Attention], bool]:
    """The attention of the layers that have one.

    Args:
        model: in evaluation mode.
        layers: by their number.
        run: one forward pass, of two sequences or more.
        shape: sequences and tokens of that pass.
        alone: the same over as many sequences of one token, of a model in which each token sees all others;
            None: it is causal.

    Returns:
        Those that the experiment shows, and whether all other layers have none: no maps, or a mixer with a
        convolution in its place.
    """
    maps = linear_like(model, [one.experts for one in layers.values() if one.experts is not None])
    beside = {}
    for number, layer in layers.items():
        # Around experts stand routers, gates of shared experts, maps to a smaller space.
        block = None if layer.experts is None else _block(layer.path, layer.experts)
        beside[number] = {
            path: module
            for path, module in maps.items()
            if layer.path and path.startswith(f"{layer.path}.") and path not in layer.own
            if block is None or not path.startswith(f"{block}.")
        }
    watched = {path: module for own in beside.values() for path, module in own.items()}
    calls = _replaced(watched, run, shape)
    first = None if alone is None else _replaced(watched, alone, (shape[0] * shape[1], 1))
    found: list[Attention] = []
    complete = True
    for number, layer in layers.items():
        noted = [call for path in beside[number] for call in calls[path]]
        one = _attention(model, number, noted, layer.count, first)
        if one is not None:
            found.append(one)
        elif not layer.path or (beside[number] and not _mixes_alone(model, layer)):
            complete = False
    return found, complete


def _mixes_alone(model: nn.Module, layer: Layer) -> bool:
    return mixes_by_convolution(model.get_submodule(layer.path), layer.path, layer.own)


def _replaced(
    watched: Mapping[str, nn.Module], run: Callable[[], Any], shape: tuple[int, int]
) -> _Calls:
    """The calls of modules in a pass over sequences of a shape, with numbers put in for their outputs."""
    calls: _Calls = {path: [] for path in watched}
    with ExitStack() as stack:
        for path, module in watched.items():
            _hook(stack, path, module, shape, calls[path])
        run()
    return calls


def _block(place: str, experts: str) -> str:
    """The module of a layer in which its experts stand: they themselves if they stand in it alone."""
    inside = experts.removeprefix(f"{place}.")
    return f"{place}.{inside.partition('.')[0]}"


def _hook(
    stack: ExitStack,
    path: str,
    module: nn.Module,
    shape: tuple[int, int],
    calls: list[_Call | None],
) -> None:
    """Note a module's calls, None for one that is not of one tensor by token, and put numbers out."""
    generator = torch.Generator().manual_seed(len(path) + sum(path.encode()))

    def replace(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        if given is not None and not given.is_floating_point():
            return None  # an embedding
        tokens = shape[0] * shape[1]
        if not _by_token(given, tokens) or not _by_token(output, tokens):
            calls.append(None)
            return None
        made = _numbered(shape, output.shape[-1], generator).to(output.dtype)
        read = given.reshape(*shape, -1).float().clone()
        calls.append(_Call(path, module, read, made.float()))
        return made.reshape(output.shape).to(output.device)

    stack.callback(module.register_forward_hook(replace, with_kwargs=True).remove)


def _by_token(value: object, tokens: int) -> TypeGuard[Tensor]:
    """Whether this is a tensor of one row a token."""
    return isinstance(value, Tensor) and value.numel() == tokens * value.shape[-1]


def _numbered(shape: tuple[int, int], width: int, generator: torch.Generator) -> Tensor:
    """Outputs [batch, tokens, width]: the first tokens of two sequences spell each entry's number."""
    made = torch.rand((*shape, width), generator=generator) * 4 - 2
    number = torch.arange(width)
    for sequence, digit in enumerate((number % _DIGITS, number // _DIGITS % _DIGITS)):
        made[sequence, 0] = (1 + digit // 2 / 128) * torch.where(digit % 2 == 0, 1.0, -1.0)
    return made


def _attention(
    model: nn.Module,
    layer: int,
    noted: list[_Call | None],
    experts: int | None,
    first: _Calls | None,
) -> Attention | None:
    """The attention of one layer whose maps ran like this. A map to one entry an expert may be a router.

    first: calls over sequences of one token; None: the first token of these sees itself alone.
    """
    calls = [call for call in noted if call is not None]
    if len(calls) < len(noted) or len({call.path for call in calls}) < len(calls):
        return None
    pairs = [
        (v, o) for v in calls for o in calls if not _same(v.input, o.input) and _mixes(v, o, first)
    ]
    if len(pairs) != 1:
        return None
    v, o = pairs[0]
    qkv = [call for call in calls if call is not o and _same(call.input, v.input)]
    others = [call for call in calls if call is not o and not any(call is one for one in qkv)]
    if any(call.output.shape[-1] != experts for call in others):
        return None
    return Attention(
        layer=layer,
        qkv=tuple(Projection(call.path, call.module) for call in qkv),
        o=Projection(o.path, o.module),
        hidden=v.input.shape[-1],
        width=o.input.shape[-1],
        made=sum(call.output.shape[-1] for call in qkv),
        hidden_out=o.output.shape[-1],
        model=model,
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _mixes(v: _Call, o: _Call, first: _Calls | None) -> bool:
    """Whether o reads means over tokens of entries of v's output: of those up to each, or of all."""
    alone = (v, o) if first is None else (_once(first[v.path]), _once(first[o.path]))
    if alone[0] is None or alone[1] is None:
        return False
    given = alone[0].output[:2, 0].T.contiguous()
    nearest = []
    for rows in alone[1].input[:2, 0].cpu().T.contiguous().split(_ROWS):
        distance, index = torch.cdist(rows, given).min(dim=1)
        if float(distance.max()) > _TOLERANCE:
            return False
        nearest.append(index)
    index = torch.cat(nearest)
    read, values = o.input.cpu(), v.output[:, :, index]
    if first is None:
        low, high = values.cummin(dim=1).values, values.cummax(dim=1).values
    else:
        # A mean of all tokens lies between the numbers of any map: sequences of one token tell maps apart.
        if float((alone[1].input.cpu() - alone[0].output[:, :, index]).abs().max()) > _TOLERANCE:
            return False
        low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    if bool(((read < low - _TOLERANCE) | (read > high + _TOLERANCE)).any()):
        return False
    return float((read - values)[:, 1:].abs().mean()) > _MIXED


def _once(calls: list[_Call | None]) -> _Call | None:
    """The only call of a module; None if there is another, or it was not of one tensor by token."""
    return calls[0] if len(calls) == 1 else None
