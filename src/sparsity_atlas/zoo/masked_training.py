"""Training by masked diffusion: which tokens are masked, among which others, and the loss (arXiv 2502.09992).

Per token the loss is the bound that `diffusion.likelihood` estimates: of a sequence of L tokens, l in 1..L of
them masked, it is the mean over the masked ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from sparsity_atlas.zoo.batches import IGNORED, Tokens, training_windows
from sparsity_atlas.zoo.tokenizer import END_OF_TEXT_ID

# Short texts end where a paragraph does, and anywhere else once in so many tokens.
CUT_ONCE_IN = 64


class Texts(NamedTuple):
    """Texts that are trained on, some to a row.

    Attributes:
        ids: int64 [rows, context]; whole texts begin with the beginning-of-text token.
        text: int64 [rows, context], the number of each token's text in its row: it sees that text alone.
    """

    ids: np.ndarray
    text: np.ndarray


class MaskedBatch(NamedTuple):
    """What a step is trained on.

    Attributes:
        inputs: int64 [rows, context], masks among them.
        targets: int64 [rows, context], the masked tokens; `IGNORED` elsewhere.
        text: see `Texts`.
        weights: float32 [rows]: the bound is Σ weight · Σ of the row's losses, in nats a token.
    """

    inputs: np.ndarray
    targets: np.ndarray
    text: np.ndarray
    weights: np.ndarray


def masked_batches(
    tokens: Tokens, context: int, rows: int, seed: int, *, mask_token: int, short_texts: float
) -> Iterator[MaskedBatch]:
    """Batches without end, of the windows that a causal model with the same seed is trained on.

    Args:
        tokens: the training text.
        context: tokens of a row, the beginning-of-text token among them.
        rows: of a batch.
        seed: of the windows' order, the cuts and the masks.
        mask_token: id of the mask.
        short_texts: share of the rows that are cut into short texts.
    """
    generator = np.random.default_rng([seed, 1])  # not the numbers that the windows are drawn with
    begins = np.zeros(len(tokens.ids), dtype=bool)
    begins[tokens.starts] = True
    for starts in training_windows(tokens, context, rows, seed):
        places = starts[:, None] + np.arange(context - 1)
        ids = np.full((rows, context), END_OF_TEXT_ID, dtype=np.int64)
        ids[:, 1:] = tokens.ids[places]
        # Of a text that begins inside a row the token before, a line break, becomes its first.
        first = np.zeros(ids.shape, dtype=bool)
        first[:, 1:-1] = begins[places[:, 1:]]
        whole = rows - round(short_texts * rows)
        first[:whole] = False
        yield masked(cut(ids, first, whole, generator), mask_token, generator)


def cut(ids: np.ndarray, first: np.ndarray, whole: int, generator: np.random.Generator) -> Texts:
    """Cut rows into texts: one at each paragraph, and one at some other tokens.

    Args:
        ids: int64 [rows, context], changed in place.
        first: bool [rows, context]; these tokens become the beginning-of-text token.
        whole: so many rows stay whole.
        generator: of the other cuts.
    """
    ids[first] = END_OF_TEXT_ID
    others = generator.random((len(ids) - whole, ids.shape[1])) * CUT_ONCE_IN < 1
    cuts = first.copy()
    cuts[whole:] |= others
    return Texts(ids, np.cumsum(cuts, axis=1))


def masked(texts: Texts, mask_token: int, generator: np.random.Generator) -> MaskedBatch:
    """Mask random sets of tokens, of evenly spaced sizes over the rows, whose weighted losses give the bound.

    The expectation is that of a random size of each row by itself, and so the bound of each of its texts: a
    row's random order of filling in is a random order of each of its texts.
    """
    ids, text = texts
    count, context = ids.shape
    maskable = ids != END_OF_TEXT_ID
    lengths = maskable.sum(axis=1)
    shares = (generator.permutation(count) + generator.random()) / count
    # Rounding could bring the last share up to one.
    sizes = np.minimum((shares * lengths).astype(np.int64) + 1, lengths)
    order = generator.random((count, context), dtype=np.float32)
    order[~maskable] = 2
    last = np.take_along_axis(np.sort(order, axis=1), sizes[:, None] - 1, axis=1)
    chosen = order <= last
    weights = lengths / (chosen.sum(axis=1) * lengths.sum())
    return MaskedBatch(
        np.where(chosen, mask_token, ids),
        np.where(chosen, ids, IGNORED),
        text,
        weights.astype(np.float32),
    )


def masked_loss(
    model: LlamaForCausalLM, inputs: Tensor, targets: Tensor, text: Tensor, weights: Tensor
) -> Tensor:
    """The bound in nats a token that a batch gives, a scalar; the arguments are a `MaskedBatch`.

    Runs the layers one by one: the model's own forward takes no mask of what sees what without building one
    of its own.
    """
    hidden = model.model.embed_tokens(inputs)
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    seen = text[:, None, :, None] == text[:, None, None, :]
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=seen, position_embeddings=rotary)
    logits = model.lm_head(model.model.norm(hidden))
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    # A product of vectors would be made in bfloat16 where training is.
    bound: Tensor = (weights * losses.unflatten(0, inputs.shape).sum(1)).sum()
    return bound
