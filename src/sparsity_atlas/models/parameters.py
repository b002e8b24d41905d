"""How many parameters a causal language model has: those that a pass over text uses, or a token of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.experts.mixture import Experts
from sparsity_atlas.sites.find import forward_of, random_ids
from sparsity_atlas.sites.offloading import waits
from sparsity_atlas.sites.projection import COMPUTED

if TYPE_CHECKING:
    from sparsity_atlas.sites.part import Part

PROBE = (1, 4)
_OF_A_MAP = ("weight", "bias")


def count_parameters(model: nn.Module, parts: Iterable[Part] = ()) -> dict[str, int]:
    """Counts of a model's parameters, shared ones once.

    Args:
        model: called as model(ids); nothing is computed but one pass over four tokens.
        parts: of it, if it may be a mixture of experts.

    Returns:
        `total`: of the decoder, its embeddings and its head. `non_embedding`: without the tables of
        token and position embeddings and the output head. `loaded`: all that are in memory, also what
        a multimodal checkpoint has for images and sound. A packed map counts as the numbers that it stands
        for. Of a mixture also `active` and
        `active_non_embedding`: the same as `total` and `non_embedding`, but of E routed experts only
        the K that a token meets.
    """
    # First: a pass makes new objects of parameters that are brought to a device for it, or unpacked by it.
    used = {id(one) for one in [*_reached(model), *_brought(model)]}
    packed = {id(module): module for module in model.modules() if _is_packed(module)}
    inside = {id(one) for module in packed.values() for one in module.parameters()}
    inside |= {id(one) for one in _left(model)}
    everything = {id(one): one for one in model.parameters() if id(one) not in inside}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    ask = getattr(model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    tables.add(id(getattr(head, "weight", None)))
    sizes = {key: one.numel() for key, one in everything.items() if key in used}
    # Of a packed map no derivative tells whether a text passes it: all are taken to be of the decoder, since
    # what is for images or sound is left unpacked.
    stands_for = {key: _numbers(module) for key, module in packed.items()}
    sizes |= stands_for
    counts = {
        "total": sum(sizes.values()),
        "non_embedding": sum(size for key, size in sizes.items() if key not in tables),
        "loaded": sum(one.numel() for one in everything.values()) + sum(stands_for.values()),
    }
    resting = count_resting(parts)
    if resting:
        counts["active"] = counts["total"] - resting
        counts["active_non_embedding"] = counts["non_embedding"] - resting
    return counts


def _is_packed(module: nn.Module) -> bool:
    """Whether a map holds other things than its matrix of numbers."""
    inputs, outputs = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not isinstance(inputs, int) or not isinstance(outputs, int) or any(module.children()):
        return False
    weight = getattr(module, "weight", None)
    return weight is None or weight.dtype not in COMPUTED or weight.numel() != inputs * outputs


def _is_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def _left(model: nn.Module) -> Iterator[Tensor]:
    """What a quantised map that is unpacked by now keeps beside its matrix: scales, and what is like them."""
    for module in model.modules() if _is_quantised(model) else ():
        if isinstance(module, nn.Linear):
            own = module.named_parameters(recurse=False)
            yield from (value for name, value in own if name not in _OF_A_MAP)


def _numbers(module: nn.Module) -> int:
    """Numbers that a packed map stands for."""
    bias: Any = getattr(module, "bias", None)
    own: Any = module
    return int(own.in_features * own.out_features) + (0 if bias is None else int(bias.numel()))


def count_resting(parts: Iterable[Part]) -> int:
    """Parameters of the experts that a token does not meet; 0 for a dense model."""
    return sum(part.routed.resting for part in parts if isinstance(part, Experts))


def _brought(model: nn.Module) -> list[Tensor]:
    """Parameters of modules that ran in a pass, which autograd's graph does not tell.

    Of weights that wait in host memory and were brought to a device for it the graph holds what they were
    there; in a quantised model it may end where numbers are rounded.
    """
    ran: list[nn.Module] = []
    quantised = _is_quantised(model)
    waiting = [one for one in model.modules() if quantised or waits(one)]
    if waiting and not quantised:
        # A layer that ran may have read weights of modules in it without calling these.
        lists = (one for one in model.modules() if isinstance(one, nn.ModuleList))
        waiting += [layer for one in lists for layer in one]
    with ExitStack() as stack:
        for module in waiting:
            handle = module.register_forward_pre_hook(lambda module, _: ran.append(module))
            stack.callback(handle.remove)
        if waiting:
            with torch.no_grad():
                forward_of(model, random_ids(model, PROBE))()
    if not quantised:
        return [value for module in ran for value in module.parameters(recurse=not waits(module))]
    own = (pair for module in ran for pair in module.named_parameters(recurse=False))
    return [value for name, value in own if name in _OF_A_MAP]


def _reached(model: nn.Module) -> Iterator[Tensor]:
    """Parameters that the logits of a text depend on; all where the model records no derivatives.

    They are found in autograd's graph, which holds whatever was computed with, by a module or not.
    """
    ids = random_ids(model, PROBE)
    frozen = [
        one for one in model.parameters() if one.is_floating_point() and not one.requires_grad
    ]
    for one in frozen:
        one.requires_grad_(True)
    try:
        with torch.enable_grad():
            output = forward_of(model, ids)()
        logits = output if isinstance(output, Tensor) else output.logits
        if logits.grad_fn is None:
            yield from model.parameters()
            return
        seen, waiting = set(), [logits.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            waiting.extend(following for following, _ in node.next_functions)
    finally:
        for one in frozen:
            one.requires_grad_(False)
