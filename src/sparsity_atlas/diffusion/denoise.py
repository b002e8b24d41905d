"""What a masked-diffusion model is asked: the logits of some tokens, mostly masked, among all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparsity_atlas.models.logits import head
from sparsity_atlas.sparsify.transfer import sent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Asked:
    """What one forward pass is asked.

    Attributes:
        ids: int64 [rows, tokens], masks and padding among them.
        valid: bool [rows, tokens], what is no padding.
        where: int64 [places], indices into the flattened batch: the tokens whose logits are wanted.
        prompt: bool [rows, tokens], tokens of prompts.
        step: number of the step of a generation that it is made for.
        rows: of a generation, the numbers of the rows that are still filled in.
        guide: whether it is the second pass of guidance, in which prompts are masked.
    """

    ids: Tensor
    valid: Tensor
    where: Tensor
    prompt: Tensor
    step: int = 0
    rows: Sequence[int] = ()
    guide: bool = False


# Gives the logits of the tokens that are wanted, in pieces [places, vocabulary] and in order. The pass is
# made when it is called, the pieces when they are asked for.
Denoise = Callable[[Asked], Iterable[Tensor]]


def denoiser(model: PreTrainedModel, *, shifted: bool) -> Denoise:
    """How a model is asked.

    Args:
        model: in which each token sees all others.
        shifted: whether its logits at a token are of the next one (Dream), and not of the token itself
            (LLaDA).
    """
    select = head.able(model)

    def denoise(asked: Asked) -> Iterable[Tensor]:
        def call() -> Tensor:
            options = head.without_cache(model)
            mask = asked.valid.long()
            logits: Tensor = model(asked.ids, attention_mask=mask, **options).logits
            return logits

        places = told_by(asked.valid, asked.where) if shifted else asked.where
        with torch.no_grad():
            return head.logits(model, call, places, select=select)

    return denoise


def told_by(valid: Tensor, where: Tensor) -> Tensor:
    """Where the logits of tokens stand if they stand at the token before: [places].

    The first token of a row has none before it, and is told by itself, as in Dream's own sampler.
    """
    flat = valid.flatten()
    before = (where - 1).clamp_min(0)
    inside = (where % valid.shape[1] > 0) & flat[before]
    return torch.where(inside, before, where)


def guided(denoise: Denoise, asked: Asked, *, guidance: float, mask_token: int) -> Iterable[Tensor]:
    """Logits with classifier-free guidance: away from what is said without the prompt (arXiv 2502.09992).

    Args:
        denoise: the model.
        asked: with the prompt.
        guidance: w of u + (w + 1) · (c − u), c with the prompt and u without; 0: there is no second pass.
        mask_token: id of the mask.
    """
    told = denoise(asked)
    if guidance == 0:
        return told
    ids = asked.ids.masked_fill(asked.prompt, mask_token)
    untold = denoise(replace(asked, ids=ids, guide=True))
    return (u + (guidance + 1) * (c - u) for c, u in zip(told, untold, strict=True))


def padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids [rows, longest] and which are valid.

    Padding comes last, so that each row's positions begin at 0: some models look them up in a table.
    """
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), int(lengths.max())), padding)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    return sent(ids, device), sent(valid, device)
