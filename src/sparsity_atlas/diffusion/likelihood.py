"""The bound of an answer's log-likelihood: over all sets of masked tokens, or over a sample of them.

It is a lower bound of the log-likelihood that the model's orders of filling in have in the mean, for a whole
text as for an answer; see `mask_sets`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from sparsity_atlas.diffusion.denoise import Asked, Denoise, guided
from sparsity_atlas.diffusion.rows import Request, Rows, rows_of
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.models.logits.likelihoods import likelihoods
from sparsity_atlas.sparsify.transfer import fetched, sent

# Of each reading the sum of the log-probabilities of its masked tokens, and whether all are the likeliest.
Scores = list[tuple[float, bool]]


def row_scores(
    denoise: Denoise,
    rows: Rows,
    *,
    mask_token: int,
    guidance: float = 0.0,
    device: torch.device,
) -> Callable[[], Scores]:
    """Begin to ask what the masked tokens of some rows say.

    Args:
        denoise: the model.
        rows: of one batch.
        mask_token: id of the mask.
        guidance: see `guided`.
        device: of the model.

    Returns:
        What waits for it, and gives the scores of all readings, in order. It raises `NumericalFailure` where
        a sum is NaN or infinite.
    """
    longest = rows.tokens.shape[1]
    prompts = sent(rows.prompts, device)
    asked = Asked(
        *(sent(rows.tokens, device), sent(rows.valid, device), sent(rows.where, device)),
        torch.arange(longest, device=device) < prompts[:, None],
    )
    pieces = guided(denoise, asked, guidance=guidance, mask_token=mask_token)
    order = np.argsort(rows.predicted, kind="stable")
    found = fetched(likelihoods(pieces, rows.predicted[order], rows.targets[order]))

    def read() -> Scores:
        values, hits = np.empty(len(order)), np.empty(len(order), dtype=bool)
        values[order], hits[order] = found()
        sums = [math.fsum(own) for own in np.split(values, rows.starts[1:])]
        if not np.isfinite(sums).all():
            raise NumericalFailure("NaN or infinity in the logits")
        every = np.logical_and.reduceat(hits, rows.starts)
        return list(zip(sums, every.tolist(), strict=True))

    return read


def bounds(
    denoise: Denoise,
    requests: Sequence[Request],
    *,
    samples: int,
    batch_size: int,
    mask_token: int,
    padding: int,
    guidance: float = 0.0,
    device: torch.device,
) -> list[float]:
    """The bound of each request's log-likelihood, in nats.

    Args:
        denoise: the model.
        requests: what is scored.
        samples: forward passes of a row for each request, at most.
        batch_size: rows of a batch.
        mask_token: id of the mask.
        padding: id that rows are filled up with.
        guidance: see `guided`.
        device: of the model.

    Raises:
        NumericalFailure: NaN or an infinity came up.
    """
    sizes = [len(one.sets(samples).weights) for one in requests]
    number = np.repeat(np.arange(len(requests)), sizes)
    place = np.concatenate([np.arange(size) for size in sizes])
    parts: list[list[float]] = [[] for _ in requests]
    for start in range(0, len(number), batch_size):
        own = slice(start, start + batch_size)
        rows = rows_of(
            *(requests, number[own], place[own], np.arange(len(number[own]))),
            samples=samples,
            mask_token=mask_token,
            padding=padding,
        )
        read = row_scores(denoise, rows, mask_token=mask_token, guidance=guidance, device=device)
        for one, weight, (score, _) in zip(number[own], rows.weights, read(), strict=True):
            parts[one].append(float(weight) * score)
    return [math.fsum(own) for own in parts]
