"""What a model does right when requests share a row, seen on its own numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsity_atlas.forest import Batch, Request, pack
from sparsity_atlas.hypotheses import relative_error
from sparsity_atlas.scoring import Abilities, logits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Relative error of the logits that rounding explains: in float32, and in 16 bits.
EXACT, ROUNDED = 1e-5, 0.05
# So much farther off must a row without its mask be.
DISTINCT = 8
# Predictions compared at the end of each request.
PREDICTIONS = 16
# How a model says that it does not take an argument, or trips over it.
REFUSALS = (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError)


def abilities(model: PreTrainedModel, requests: list[Request]) -> tuple[Abilities, dict[str, str]]:
    """Try what saves time on the longest of some requests, without any hook of ours.

    The longest, because a window of attention shows in no shorter ones. A row that branches must give
    the logits of its requests by themselves, as far as rounding lets that be seen, and not one bit may
    depend on the tokens of another branch.

    Returns:
        What the model does right, and of the rest what is wrong with it.
    """
    sample = _sample(requests)
    plain = pack(sample, len(sample), share=False)
    shared = pack(sample, len(sample), share=True)
    with torch.no_grad():
        expected = _predictions(model, plain)
        faults = {
            "selects": _fault(
                lambda: _difference(model, expected, _predictions(model, plain, select=True))
            ),
            "branches": _fault(
                lambda: (
                    _difference(model, expected, _predictions(model, shared))
                    or _indistinct(model, expected, shared)
                    or _interference(model, shared)
                )
            ),
        }
    found = Abilities(**{name: fault is None for name, fault in faults.items()})
    return found, {name: fault for name, fault in faults.items() if fault is not None}


def _sample(requests: list[Request]) -> list[Request]:
    """The longest request, and two that leave it later with tokens of its own."""
    tokens = max((request.tokens for request in requests), key=len)
    draw = random.Random(0)
    branches = [
        tokens[:kept] + draw.choices(tokens, k=len(tokens) - kept)
        for kept in (len(tokens) // 2, 3 * len(tokens) // 4)
    ]
    return [Request(one, min(len(one) - 1, PREDICTIONS), 0) for one in (tokens, *branches)]


def _predictions(
    model: PreTrainedModel, batches: list[Batch], *, select: bool = False
) -> list[Tensor]:
    """Logits of each request's predictions, in the order of the requests."""

    def call(ids: Tensor, **options: Tensor) -> Tensor:
        # Past the hooks on the model itself: they count an evaluation's passes.
        return model.forward(ids, **options).logits

    found: dict[int, Tensor] = {}
    for batch in batches:
        every = logits(model, call, batch, select=select)
        parts = np.split(batch.row, batch.firsts[1:])
        for request, rows in zip(batch.requests, parts, strict=True):
            found[request] = every[torch.from_numpy(rows).to(every.device)]
    return [found[request] for request in sorted(found)]


def _difference(model: PreTrainedModel, expected: list[Tensor], found: list[Tensor]) -> str | None:
    """What is wrong with logits, if anything is."""
    allowed = EXACT if model.dtype == torch.float32 else ROUNDED
    error = _error(expected, found)
    # Written so that NaN is wrong.
    return None if error <= allowed else f"relative error {error:.2g}, allowed {allowed:.2g}"


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(relative_error(*pair) for pair in zip(expected, found, strict=True))


def _indistinct(model: PreTrainedModel, expected: list[Tensor], batches: list[Batch]) -> str | None:
    """Whether rounding to 16 bits could hide a mistake: without its mask a row must be far off."""
    if model.dtype == torch.float32 or not any(batch.branched for batch in batches):
        return None
    unmasked = [replace(one, ends=np.full_like(one.ends, one.ends.shape[1])) for one in batches]
    error = _error(expected, _predictions(model, batches))
    wrong = _error(expected, _predictions(model, unmasked))
    if DISTINCT * error <= wrong:
        return None
    return f"relative error {error:.2g}, which a mistake could explain: without a mask {wrong:.2g}"


def _interference(model: PreTrainedModel, batches: list[Batch]) -> str | None:
    """Whether a row's last request changes with tokens that it does not contain."""
    for batch in (one for one in batches if one.branched):
        place = np.arange(batch.tokens.shape[1])
        last = batch.lengths[:, None] - 1
        strange = (place <= last) & (batch.ends <= last)
        changed = replace(batch, tokens=np.where(strange, batch.tokens[:, :1], batch.tokens))
        before, after = (_predictions(model, [one]) for one in (batch, changed))
        numbers = sorted(batch.requests)
        for request, place_of in zip(batch.requests, batch.last, strict=True):
            row, column = divmod(int(place_of), batch.tokens.shape[1])
            index = numbers.index(request)
            if column == last[row] and not torch.equal(before[index], after[index]):
                return "a branch depends on its neighbour"
    return None


def _fault(attempt: Callable[[], str | None]) -> str | None:
    """What an attempt finds wrong, or how the model refuses it."""
    try:
        return attempt()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as refusal:
        return f"{type(refusal).__name__}: {(str(refusal).splitlines() or [''])[0]}"
