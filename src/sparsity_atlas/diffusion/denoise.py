"""What a masked-diffusion model is asked: the logits of some tokens, mostly masked, among all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsity_atlas.models.logits import head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Gives the logits of the tokens at some places, in pieces [places, vocabulary] and in order.
#   ids: int64 [rows, tokens], masks and padding among them;
#   valid: bool [rows, tokens], what is no padding;
#   where: int64 [places], indices into the flattened batch.
Denoise = Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]]


def denoiser(model: PreTrainedModel, *, shifted: bool) -> Denoise:
    """How a model is asked.

    Args:
        model: in which each token sees all others.
        shifted: whether its logits at a token are of the next one (Dream), and not of the token itself
            (LLaDA).
    """
    select = head.able(model)

    def denoise(ids: Tensor, valid: Tensor, where: Tensor) -> Iterable[Tensor]:
        def call() -> Tensor:
            options = head.without_cache(model)
            logits: Tensor = model(ids, attention_mask=valid.long(), **options).logits
            return logits

        places = told_by(valid, where) if shifted else where
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


def guided(
    denoise: Denoise,
    ids: Tensor,
    valid: Tensor,
    where: Tensor,
    prompt: Tensor,
    *,
    guidance: float,
    mask_token: int,
) -> Iterable[Tensor]:
    """Logits with classifier-free guidance: away from what is said without the prompt (arXiv 2502.09992).

    Args:
        denoise: the model.
        ids: see `Denoise`.
        valid: likewise.
        where: likewise.
        prompt: bool [rows, tokens], what is masked in the second pass.
        guidance: w of u + (w + 1) · (c − u), c with the prompt and u without; 0: there is no second pass.
        mask_token: id of the mask.
    """
    told = denoise(ids, valid, where)
    if guidance == 0:
        return told
    untold = denoise(ids.masked_fill(prompt, mask_token), valid, where)
    return (u + (guidance + 1) * (c - u) for c, u in zip(told, untold, strict=True))


def padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids [rows, longest] and which are valid.

    Padding comes last, so that each row's positions begin at 0: some models look them up in a table.
    """
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), padding)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.as_tensor(row)
    valid = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.to(device), valid.to(device)
