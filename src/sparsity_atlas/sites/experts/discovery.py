"""Find the routed experts of a model, prove that the implementation with taps computes them, or say why not.

A candidate is a module that goes through transformers' experts interface, or is of Llama 4's form. Then, by
numbers:

1. In an ordinary pass the implementation runs once in each of them, over one row a token, sequence behind
   sequence, with experts' ids that there are.
2. On random rows, routed so that every expert gets some, it gives what the class's own forward gives.
3. The gate is a product of two factors (`gating`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.experts.experts_modules import experts_modules
from sparsity_atlas.sites.experts.gating import find_gating
from sparsity_atlas.sites.experts.grouping import Grouping
from sparsity_atlas.sites.experts.implementation import (
    NAME,
    Tap,
    chosen,
    compute,
    installed,
    tapped,
)
from sparsity_atlas.sites.experts.routed import RoutedExperts
from sparsity_atlas.sites.experts.scaled_inputs import ScaledInputs, meets_one
from sparsity_atlas.sites.offloading import offloaded
from sparsity_atlas.sites.probe.hypotheses import relative_error, tolerance

# Of a changed token's effect: how far other sequences may follow it by rounding alone.
_APART = 0.01


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of routed experts, by path; those that cannot be served are refused.

    Raises:
        AtlasError: quantised experts, experts spread over devices, experts outside the interface.
    """
    found = experts_modules(model)
    for path, module in [*found.items(), *_others(model, found)]:
        own = module.own if isinstance(module, ScaledInputs) else module
        where = f"{type(model).__name__}: {path} ({type(own).__name__})"
        for parameter in module.parameters():
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                kind = str(parameter.dtype).removeprefix("torch.")
                raise AtlasError(
                    f"{where} holds quantised experts ({kind}), which run kernels of their own: load the "
                    "model dequantised"
                )
        if offloaded(module):
            raise AtlasError(
                f"{where} waits in host memory until it runs (device_map: auto): experts are read where they "
                "lie, and must be on a device; use one with more memory"
            )
        if path not in found:
            raise AtlasError(
                f"{where} holds experts that do not go through transformers' experts interface: what each "
                "expert reads and makes cannot be seen there; such mixtures are not supported"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise AtlasError(
                f"{where} holds only some of the experts: load the model on one device"
            )
    return found


def _others(model: nn.Module, found: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """What looks like routed experts and is none of those that were found."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # How many experts there may be: not how many a token meets, and not how wide they are.
    counts = {
        value
        for key, value in (vars(text).items() if text is not None else ())
        if "expert" in key and "per_tok" not in key and "size" not in key
        if type(value) is int and value > 1
    }
    for path, module in model.named_modules():
        if any(path == one or _within(path, one) or _within(one, path) for one in found):
            continue
        last = path.rpartition(".")[2].lower()
        # A shared expert is a dense FFN to which every token goes: the search for those finds it.
        maps = any(parameter.dim() > 1 for parameter in module.parameters())
        named = "expert" in last and "shared" not in last and not isinstance(module, nn.Linear)
        # Experts are often one tensor [experts, out, in].
        stacked = any(
            parameter.dim() == 3
            and parameter.shape[0] in counts
            and not isinstance(module, nn.Conv1d)
            for parameter in module.parameters(recurse=False)
        )
        if (named and maps) or stacked:
            yield path, module


def _within(path: str, place: str) -> bool:
    return path.startswith(f"{place}.")


def find_experts(model: Any, ids: Tensor, call: Callable[[Tensor], Any]) -> list[RoutedExperts]:
    """Find and prove the experts of every layer that has some: two passes, and one of each module by itself.

    Args:
        model: of transformers, in evaluation mode.
        ids: int64 [batch, tokens], two sequences or more.
        call: a forward pass of the model over such ids.

    Returns:
        In the order of execution. Empty for a dense model.

    Raises:
        AtlasError: what does not hold, and where.
    """
    modules = candidates(model)
    if not modules:
        return []
    if not hasattr(model, "set_experts_implementation"):
        raise AtlasError(
            f"{type(model).__name__}: no model of transformers, whose experts can be watched"
        )
    with torch.no_grad():
        with installed(model):
            for path, module in modules.items():
                own = getattr(getattr(module, "config", None), "_experts_implementation", None)
                if own != NAME and not isinstance(module, ScaledInputs):
                    raise AtlasError(
                        f"{type(model).__name__}: {path}: the model does not let the implementation of "
                        "its experts be set"
                    )
            seen = _passes(modules, ids, call)
        order = sorted(seen, key=lambda path: seen[path].number)
        return [_prove(model, path, modules[path], seen[path]) for path in order]


class _Seen:
    """What came by in one module, in the pass in hand."""

    def __init__(self, number: int, grouping: Grouping, x: Tensor) -> None:
        self.number = number
        self.index = grouping.index
        self.x = x.clone()


def _passes(
    modules: dict[str, nn.Module], ids: Tensor, call: Callable[[Tensor], Any]
) -> dict[str, _Seen]:
    """One pass, and one with another last token in the first sequence."""
    first = _watched(modules, lambda: call(ids))
    other = ids.clone()
    other[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else ids[0, 1]
    second = _watched(modules, lambda: call(other))
    tokens = ids.shape[1]
    for path, one in first.items():
        if one.x.shape[0] != ids.numel():
            raise AtlasError(
                f"{path}: its experts got {one.x.shape[0]} rows for {ids.numel()} tokens; packed batches are "
                "not supported"
            )
        count = getattr(modules[path], "num_experts", 0)
        low, high = int(one.index.min()), int(one.index.max())
        if low < 0 or high >= count:
            raise AtlasError(
                f"{path}: tokens go to experts {low} to {high}, of which there are {count}"
            )
        changed = (one.x - second[path].x).float().abs().amax(-1)
        if not float(changed[tokens:].max()) <= _APART * float(changed[:tokens].max()):
            raise AtlasError(
                f"{path}: its rows are not the tokens of one sequence behind the other"
            )
    return first


def _watched(modules: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    with ExitStack() as stack:
        for path, module in modules.items():

            def note(grouping: Grouping, x: Tensor, _: Tensor, path: str = path) -> None:
                if path in seen:
                    raise AtlasError(f"{path}: its experts run several times in one forward pass")
                seen[path] = _Seen(len(seen), grouping, x)

            stack.enter_context(tapped(module, Tap("input", note)))
            if isinstance(module, ScaledInputs):
                stack.enter_context(meets_one(module, path))
        run()
    missing = [path for path in modules if path not in seen]
    if missing:
        raise AtlasError(f"{missing[0]}: its experts do not run in a forward pass of the model")
    return seen


def _prove(model: Any, path: str, module: Any, seen: _Seen) -> RoutedExperts:
    count, each = module.num_experts, seen.index.shape[-1]
    down = module.down_proj
    width = down.shape[-2 if module.is_transposed else -1]
    where = f"{type(model).__name__}: {path}"
    _equivalent(model, module, seen.x, (count, each), where)
    gating = None
    if module.has_gate:
        device = down.device if down.device.type != "mps" else torch.device("cpu")  # has no float64
        gating = find_gating(module._apply_gate, width, device, where)
    return RoutedExperts(path, module, count, each, seen.x.shape[-1], width, gating)


def _equivalent(model: Any, module: Any, like: Tensor, sizes: tuple[int, int], where: str) -> None:
    """The class's own forward and the implementation agree where every expert gets rows."""
    count, each = sizes
    rows = math.ceil(2 * count / each)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, like.shape[-1], generator=generator) * float(like.float().std())
    index = (torch.arange(rows * each) % count).view(rows, each).to(like.device)
    weights = torch.rand(rows, each, generator=generator) + 0.1
    given = x.to(like), index, weights.to(like)
    with chosen(model, "eager"):
        own = module.forward(*given)
    ours = compute(module, *given, taps=())
    error, allowed = relative_error(own, ours), tolerance(like.dtype)
    # Written so that NaN fails.
    if not error <= allowed:
        raise AtlasError(
            f"{where}: its own forward pass and the one that is watched differ: relative error "
            f"{error:.2g}, allowed {allowed:.2g}"
        )
