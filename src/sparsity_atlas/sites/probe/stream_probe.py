"""Tell FFNs from other maps of their form, such as gates of norms, by where what they make goes.

What an FFN makes is added to the stream that runs through the layers, by itself, normed or weighted. What a
gate makes is multiplied with something, or read by another map: put in random numbers for it, as large as the
layer's output, and that does not move along them. No name is looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.probe.hypotheses import Findings, Hypothesis
from sparsity_atlas.sites.probe.layers import module_lists

# Cosine over tokens of an entry's numbers and of how it moves in the output, mean over entries. Over all
# model types of transformers it is 0.7 or more of what adds, and less than 0.1 of what does not.
_ALONG = 0.4


def added_to_stream(model: nn.Module, findings: Findings, run: Callable[[], Any]) -> None:
    """Take those whose output is not added to the output of their layer out of the proved FFNs.

    In one forward pass each layer that holds some runs twice more for each of them. One that stands in no
    list of layers, or whose layer gives nothing of its width, is kept: nothing shows that it does not add.

    Args:
        model: in evaluation mode.
        findings: of the search; `proved` loses them, `elsewhere` gets them.
        run: one forward pass, without a cache.
    """
    lists = [path for path, _ in module_lists(model)]
    inside: dict[str, list[Hypothesis]] = defaultdict(list)
    for one in findings.proved:
        around = [path for path in lists if one.down.path.startswith(f"{path}.")]
        if around:
            place = min(around, key=len)
            number = one.down.path.removeprefix(f"{place}.").partition(".")[0]
            inside[f"{place}.{number}"].append(one)
    seen: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        for place, own in inside.items():

            def try_each(
                layer: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                own: list[Hypothesis] = own,
            ) -> None:
                for one in own:
                    along = _along(layer, args, kwargs, output, one.down.module)
                    if along is not None:
                        seen[one.down.path].append(along)

            layer = model.get_submodule(place)
            stack.callback(layer.register_forward_hook(try_each, with_kwargs=True).remove)
        run()
    proved = findings.proved
    findings.elsewhere = [one for one in proved if min(seen[one.down.path], default=1) < _ALONG]
    findings.proved = [one for one in proved if one not in findings.elsewhere]


def _along(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, down: nn.Module
) -> float | None:
    """How far a layer's output moves along numbers put in for what `down` makes: 1 wholly, 0 not.

    What multiplies moves an entry by its sign in each token, what adds by the same one in all.
    None: the layer does not run it once, or gives nothing of its width.
    """
    usual = _stream(output)
    if usual is None:
        return None
    scale = float(usual.float().square().mean().sqrt())
    made: list[Tensor] = []
    moved: list[Tensor] = []
    for sign in (1, -1):

        def put(_: nn.Module, given: Any, result: Tensor, sign: int = sign) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(result.shape, generator=generator).to(result.device)
            made.append(drawn)
            return (sign * scale * drawn).to(result.dtype)

        handle = down.register_forward_hook(put)
        try:
            # forward() and not the module itself: hooks see only what the model computes.
            found = _stream(layer.forward(*args, **kwargs))
            moved += [] if found is None else [found.float()]
        finally:
            handle.remove()
    if (len(made), len(moved)) != (2, 2):
        return None
    width = made[0].shape[-1]
    change = moved[0] - moved[1]
    if change.shape[-1] != width or change.numel() % made[0].numel():
        return None
    # Several streams stand before the tokens, or behind them.
    rows = made[0].flatten(0, -2).to(change.device)
    before = change.reshape(-1, *rows.shape)
    behind = change.reshape(len(rows), -1, width).movedim(1, 0)
    by_entry = torch.cosine_similarity(torch.cat([before, behind]), rows, dim=1)
    return float(by_entry.mean(dim=1).abs().max())


def _stream(output: Any) -> Tensor | None:
    """What a layer gives to the next one: the tensor, or the first of several."""
    if isinstance(output, Tensor):
        return output
    first = output[0] if isinstance(output, Sequence) and output else None
    return first if isinstance(first, Tensor) else None
