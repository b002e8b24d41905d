"""Proof of found FFNs on the model's own numbers, through the hooks that will be used later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.attention import Attention
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.hooks import observe
from sparsity_atlas.sites.part import Vectors
from sparsity_atlas.sites.probe.hypotheses import relative_error, tolerance
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import ATTENTION_TENSORS

# Loose: reduced-precision products (TF32) must pass, and what is not affine misses by far more. Packed maps
# may round what they read to 8 bits.
AFFINE, ROUNDED = 0.03, 0.1


def prove(ffns: list[FFN], run: Callable[[], Any]) -> list[FFN]:
    """Prove each FFN in an ordinary forward pass.

    In float32, with a relative error that rounding in the model's own type can explain: u ⊙ g = i;
    the factors recomputed from x are those that the model used; FFN(x) is what the down projection
    gave; all projections are affine. That each tensor comes by once is seen to by `observe`.

    Args:
        ffns: all FFNs of one model, in evaluation mode.
        run: one forward pass over a few tokens.

    Returns:
        The FFNs, those marked whose factors the model overwrites.

    Raises:
        AtlasError: names the layer, the equation and the error.
    """
    seen: dict[int, dict[str, tuple[Tensor, Tensor]]] = {ffn.layer: {} for ffn in ffns}
    overwritten: set[int] = set()
    by_layer = {ffn.layer: ffn for ffn in ffns}

    def keep(vectors: Vectors) -> None:
        layer, name, tensor = vectors.part.layer, vectors.tensor, vectors.values
        seen[layer][name] = (tensor, tensor.clone())
        if name == "intermediate" and any(
            not torch.equal(seen[layer][factor][0], seen[layer][factor][1])
            for factor in ("up", "gate")
            if factor in seen[layer]
        ):
            overwritten.add(layer)

    def finish(layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        values = {name: copy for name, (_, copy) in seen[layer].items()}
        # Freed layer by layer: a large model's activations are not kept to the end.
        seen[layer].clear()
        if "input" in values and "intermediate" in values:
            _check(by_layer[layer], values, output.reshape(*values["input"].shape[:-1], -1))

    with ExitStack() as stack:
        for tensors in dict.fromkeys(ffn.tensors for ffn in ffns):
            group = [ffn for ffn in ffns if ffn.tensors == tensors]
            stack.enter_context(observe(group, tensors, keep))
        for ffn in ffns:

            def hook(*call: Any, layer: int = ffn.layer) -> None:
                finish(layer, *call)

            stack.callback(ffn.down.module.register_forward_hook(hook).remove)
        run()
    return [replace(ffn, overwritten=ffn.layer in overwritten) for ffn in ffns]


def proves_attention(found: Sequence[Attention], run: Callable[[], Any]) -> bool:
    """Whether all maps of every attention are affine, seen in an ordinary forward pass."""
    errors: list[float] = []

    def check(vectors: Vectors) -> None:
        for projection in vectors.part.readers(vectors.tensor):
            error = relative_error(*_affine(projection, vectors.values))
            errors.append(error / _rounding(projection))

    with observe(found, ATTENTION_TENSORS, check):
        run()
    # Written so that NaN fails.
    return all(error <= 1 for error in errors)


def _check(ffn: FFN, values: dict[str, Tensor], output: Tensor) -> None:
    x, i = values["input"], values["intermediate"]
    u, g = ffn.factors(x)
    again = ffn.intermediate(x)
    limit = tolerance(x.dtype)
    equations = {
        "intermediate(x) = input of the down projection": (i, again, limit),
        "down(i) = the FFN's output": (output, ffn.down(i), limit),
        "FFN(x) = the FFN's output": (output, ffn.down(again), 2 * limit),
        "up is affine": (*_affine(ffn.up, x), _rounding(ffn.up)),
        "down is affine": (*_affine(ffn.down, i), _rounding(ffn.down)),
    }
    if ffn.gate is not None:
        equations |= {"gate is affine": (*_affine(ffn.gate, x), _rounding(ffn.gate))}
    if g is not None and "gate" in values:
        equations |= {
            "u ⊙ g = input of the down projection": (i, values["up"] * values["gate"], limit),
            "u(x) = the u that was used": (values["up"], u, limit),
            "g(x) = the g that was used": (values["gate"], g, limit),
        }
    for equation, (expected, found, allowed) in equations.items():
        _hold(ffn, equation, expected, found, allowed)


def _hold(ffn: FFN, equation: str, expected: Tensor, found: Tensor, allowed: float) -> None:
    error = relative_error(expected, found)
    where = f"layer {ffn.layer} ({ffn.down.path})"
    if not math.isfinite(error):
        kind = str(found.dtype).removeprefix("torch.")
        raise AtlasError(
            f"{where}: NaN or infinity comes up where its FFN is tried: {equation}; its weights are too "
            f"large for {kind}"
        )
    if not error <= allowed:
        raise AtlasError(
            f"{where}: {equation} does not hold on the model's own numbers: relative error {error:.2g}, "
            f"allowed {allowed:.2g}"
        )


def _rounding(projection: Projection) -> float:
    """The relative error by which a map may miss being affine."""
    packed = projection.weight() is None and hasattr(projection.module, "in_features")
    return ROUNDED if packed else AFFINE


def _affine(projection: Projection, like: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) + f(y) − f(0) and f(x + y) for random rows x and y, of the width and type of `like`.

    Random and not the model's own: those can be so small that float16 rounds them to nothing.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, like.shape[-1], generator=generator).to(like)
    rows = torch.cat([x, y, torch.zeros_like(x), x + y])
    first, second, offset, both = projection(rows).float().chunk(4)
    return first + second - offset, both
