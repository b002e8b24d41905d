"""Tell FFNs that make part of a router from shared experts, by what changes with them.

A router may hold an FFN of its own. What a shared expert makes is added to what its layer's experts make; of
which experts these are, and of how much each counts, it says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.block import layer_path
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.part import Part
from sparsity_atlas.sites.probe.hypotheses import relative_error

# Relative errors of rows and weights, and the share of ids that rounding may flip where scores all but tie.
_ROUNDING, _FLIPPED = 0.05, 0.25


def routing_ffns(
    model: nn.Module, ffns: Sequence[FFN], experts: Sequence[Part], run: Callable[[], Any]
) -> set[int]:
    """The layers whose FFN changes which experts tokens go to, or what these read.

    In one forward pass each layer that holds both runs twice more, once with the FFN's output set to zero.

    Args:
        model: in evaluation mode.
        ffns: as they were found.
        experts: those of all layers.
        run: one forward pass.

    Raises:
        AtlasError: a layer has no module of its own, or its experts do not run in it.
    """
    paths = {part.layer: part.paths[0] for part in experts}
    found: set[int] = set()
    both = [ffn for ffn in ffns if ffn.layer in paths]
    if not both:
        return found
    with ExitStack() as stack:
        for ffn in both:
            place = layer_path(ffn.layer, [*ffns, *experts])
            if not place:
                raise AtlasError(f"layer {ffn.layer}: no module holds it alone")
            layer = model.get_submodule(place)
            module = model.get_submodule(paths[ffn.layer])

            def compare(
                layer: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                _: Any,
                ffn: FFN = ffn,
                module: nn.Module = module,
            ) -> None:
                with_it = _read(layer, module, args, kwargs)
                handle = ffn.down.module.register_forward_hook(lambda *call: call[-1] * 0)
                try:
                    without = _read(layer, module, args, kwargs)
                finally:
                    handle.remove()
                if any(map(_differ, with_it, without)):
                    found.add(ffn.layer)

            stack.callback(layer.register_forward_hook(compare, with_kwargs=True).remove)
        run()
    return found


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether more than rounding lies between them: a model need not give the same bits twice."""
    if one.is_floating_point():
        return not relative_error(one, other) <= _ROUNDING
    return float((one != other).float().mean()) > _FLIPPED


def _read(
    layer: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """What a layer's experts are called with where the layer runs by itself: rows, ids, weights."""
    seen: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.extend(one.clone() for one in (*given, *named.values()) if isinstance(one, Tensor))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        # forward() and not the module itself: hooks see only what the model computes.
        layer.forward(*args, **kwargs)
    finally:
        handle.remove()
    if not seen:
        raise AtlasError(f"{type(module).__name__}: experts that do not run where their layer does")
    return seen
