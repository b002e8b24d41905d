"""Whether a model gives the same numbers with a ring of keys and values as without a cache."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from sparsity_atlas.lm.answers import Proof
from sparsity_atlas.lm.continuous.called import Called
from sparsity_atlas.lm.continuous.recorded_step import prompt_columns
from sparsity_atlas.lm.continuous.ring import Ring
from sparsity_atlas.lm.sharing import DISTINCT, ways
from sparsity_atlas.models.logits.head import EXACT, REFUSALS, ROUNDED
from sparsity_atlas.sites.probe.hypotheses import relative_error

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsity_atlas.lm.forward import Masks

# Tokens of each row that are fed by themselves, and rows that are not of the sample.
FED, FREE = 4, 1
# Tokens of the shortest sample.
SHORTEST = 16


def proved(model: PreTrainedModel, tokens: list[int], size: int) -> Proof:
    """Try it without any hook of ours, with rows of two lengths, across the end of the ring.

    Args:
        model: the model.
        tokens: of a prompt, repeated as need be.
        size: tokens that a row of the ring shall hold; so long is the sample, since a window of attention
            shows in no shorter one.
    """
    size = max(size, SHORTEST)
    sample = (tokens * (size // len(tokens) + 1))[:size]
    fault = ""
    for masks in ways(model, size):
        try:
            fault = _fault(Called(model), sample, masks) or ""
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as refusal:
            words = f"{type(refusal).__name__}: {(str(refusal).splitlines() or [''])[0]}"
            fault = f"its layers ask more of a cache than keys and values ({words})"
        if not fault:
            return Proof(size, masks)
    return Proof(size, None, fault)


def _fault(called: Called, sample: list[int], masks: Masks) -> str | None:
    size = len(sample)
    rows = [torch.tensor(one, device=called.device) for one in (sample, sample[1 : size // 2 + 1])]
    expected = [called.plain(row[None])[0, -FED:] for row in rows]
    step = partial(_found, called, rows, size, masks)
    found = step(seen=None)
    exact = expected[0].dtype == torch.float32
    error = _error(expected, found)
    allowed = EXACT if exact else ROUNDED
    # Written so that NaN is wrong.
    if not error <= allowed:
        return f"it gives other numbers (relative error {error:.2g}, allowed {allowed:.2g})"
    if exact:
        return None
    wrong = _error(expected, step(seen=size))
    if DISTINCT * error <= wrong:
        return None
    return (
        f"it gives other numbers (relative error {error:.2g}, which a mistake could explain: without a mask "
        f"{wrong:.2g})"
    )


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(relative_error(*pair) for pair in zip(expected, found, strict=True))


def _found(
    called: Called, rows: list[Tensor], size: int, masks: Masks, *, seen: int | None
) -> list[Tensor]:
    """What the head gets of each row's last tokens, fed by themselves, [FED, hidden].

    Args:
        called: the model.
        rows: its tokens, the longest first.
        size: of the ring.
        masks: how it is told who sees whom.
        seen: tokens that every row sees, its own or not; None: its own.
    """
    device = called.device
    ring = Ring(len(rows) + FREE, size, device)
    # So that both the prompts and what is fed come round.
    ring.clock.fill_(size - FED // 2)
    prompts = [row[:-FED] for row in rows]
    longest = len(prompts[0])
    ids = torch.stack([torch.nn.functional.pad(one, (longest - len(one), 0)) for one in prompts])
    lengths = torch.tensor([len(one) for one in prompts], device=device)
    valid = torch.arange(longest, device=device) >= longest - lengths[:, None]
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    columns = torch.from_numpy(prompt_columns(size - FED // 2, longest, size)).to(device)
    with ring.prompts(torch.arange(len(rows), device=device), columns, valid):
        called.hidden(ids, positions, valid, ring)
    lengths = torch.cat([lengths, lengths.new_zeros(FREE)])
    made = []
    for step in range(FED):
        fed = torch.stack([row[len(row) - FED + step] for row in [*rows, *rows[:1] * FREE]])
        lengths = (lengths + 1).clamp(max=size)
        reach = lengths if seen is None else torch.full_like(lengths, seen)
        mask = called.masks(ring.age(), reach, masks)
        made.append(called.hidden(fed[:, None], (lengths - 1)[:, None], mask, ring)[:, -1])
        ring.clock.add_(1).remainder_(size)
    return list(torch.stack(made, 1)[: len(rows)])
