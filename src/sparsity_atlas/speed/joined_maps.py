"""The maps of a layer that is joined: one product where several read the same, both factors in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsity_atlas.decoding.backend import backend_of
from sparsity_atlas.speed.products import name_of

if TYPE_CHECKING:
    from torch import Tensor

_FFN = ("up_proj", "gate_proj", "down_proj")


def is_own(module: nn.Module) -> bool:
    """Whether a module does what its class says: nothing is attached to it, or put in its place."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and "forward" not in module.__dict__


def is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and is_own(module)


def reading(readers: list[Any]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What several maps make of one vector: one product, if nothing hangs on them."""
    if not all(is_plain(one) for one in readers):
        return lambda x: tuple(one(x) for one in readers)
    sizes = [one.out_features for one in readers]
    weight = torch.cat([one.weight.detach() for one in readers])
    biases = [one.bias for one in readers if one.bias is not None]
    bias = torch.cat([one.detach() for one in biases]) if len(biases) == len(readers) else None
    if biases and bias is None:
        return lambda x: tuple(one(x) for one in readers)
    return lambda x: F.linear(x, weight, bias).split(sizes, -1)


def ffn(module: Any) -> Callable[[Tensor], Tensor]:
    """What an FFN makes of a vector: its factors in one launch, if nothing hangs on their maps."""
    maps: list[Any] = [getattr(module, one, None) for one in _FFN]
    plain = all(is_plain(one) and one.bias is None for one in maps)
    function = getattr(module, "act_fn", None)
    activation = name_of(function) if plain and function is not None else None

    def own(x: Tensor) -> Tensor:
        made: Tensor = module(x)
        return made

    if activation is None or not is_own(module):
        return own
    up, gate, down = maps

    def made(x: Tensor) -> Tensor:
        rows = x[:, 0]
        backend = backend_of(rows, up.weight)
        if backend is None:
            return own(x)
        found: Tensor = down(backend.factors(rows, up.weight, gate.weight, activation))
        return found[:, None]

    return made
