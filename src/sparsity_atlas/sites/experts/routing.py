"""Which experts each token went to in a pass, and the same choice made again in another one.

The sums of a grouped product follow how many rows each expert gets, and so do its last bits; and where
two experts' scores lie within rounding of each other, another sum lets a token go to the other one. Two
passes of which one is to say something about the other are therefore made with one routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.experts.experts_modules import experts_modules
from sparsity_atlas.sites.experts.scaled_inputs import ScaledInputs, sent
from sparsity_atlas.sites.module_hooks import find_tensor, replace_tensor

Choices = dict[str, Tensor]
"""The experts of each token, int [N, K], by the path of the experts module."""

# What experts are called with, see `implementation.forward`.
_NAMES = ("hidden_states", "top_k_index", "top_k_weights")
_Change = Callable[[str, Tensor, Tensor], "tuple[Tensor, Tensor]"]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Choices]:
    """Note the routing of a forward pass; nothing for a dense model."""
    seen: Choices = {}

    def note(path: str, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        seen[path] = index.clone()
        return index, weights

    with _changed(model, note):
        yield seen


@contextmanager
def repeated(model: nn.Module, routing: Choices, where: Tensor) -> Iterator[None]:
    """Send some tokens of a forward pass to the experts that a routing names.

    An expert keeps the weight that the pass itself gives it; one that it would not choose gets that of
    an expert that it would.

    Args:
        model: a dense model is left as it is.
        routing: for as many tokens as the pass has; what it says of the others is not looked at.
        where: bool [N], which tokens are sent.
    """

    def send(path: str, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        wanted = routing[path].to(index)
        # Where nothing changes, not a bit does.
        rows = where.to(index.device) & (wanted != index).any(-1)
        moved = weights.gather(-1, _places(wanted, index))
        chosen = rows[:, None]
        return torch.where(chosen, wanted, index), torch.where(chosen, moved, weights)

    with _changed(model, send):
        yield


def _places(wanted: Tensor, index: Tensor) -> Tensor:
    """Where in `index` [N, K] the weight of each wanted expert [N, K] stands."""
    same = wanted[:, :, None] == index[:, None]
    found = same.any(2)
    # Those that are left over, first.
    rest = same.any(1).int().sort(dim=-1, stable=True).indices
    rank = ((~found).cumsum(-1) - 1).clamp_min(0)
    return torch.where(found, same.int().argmax(2), rest.gather(-1, rank))


@contextmanager
def _changed(model: nn.Module, change: _Change) -> Iterator[None]:
    with ExitStack() as stack:
        for path, module in experts_modules(model).items():
            scaled = isinstance(module, ScaledInputs)
            own: nn.Module = module.own if isinstance(module, ScaledInputs) else module
            enter = partial(_enter, module, partial(change, path))
            # Where it is rerouted: before its rows are taken out of its hands.
            handle = own.register_forward_pre_hook(enter, prepend=scaled, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _enter(
    module: nn.Module,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    _: nn.Module,
    given: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[Any, ...]:
    """What an experts module is called with, after its routing is changed."""
    if isinstance(module, ScaledInputs):
        where = find_tensor(given, named, "experts")
        rows = given[where] if isinstance(where, int) else named[where]
        return replace_tensor(given, named, where, sent(rows, module.num_experts, change))
    every = dict(zip(_NAMES, given, strict=False)) | named
    every["top_k_index"], every["top_k_weights"] = change(
        every["top_k_index"], every["top_k_weights"]
    )
    return tuple(every.pop(name) for name in _NAMES), every
