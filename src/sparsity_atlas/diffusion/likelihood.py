"""The bound of an answer's log-likelihood: over all sets of masked tokens, or over a sample of them.

It is a lower bound of the log-likelihood that the model's orders of filling in have in the mean, for a whole
text as for an answer; see `mask_sets`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsity_atlas.diffusion.denoise import Asked, Denoise, guided, padded
from sparsity_atlas.diffusion.mask_sets import mask_sets
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.files.whole import digest
from sparsity_atlas.models.logits.likelihoods import likelihoods
from sparsity_atlas.sparsify.transfer import fetched, sent


@dataclass(frozen=True)
class Request:
    """What is scored: an answer after a prompt, which may be empty.

    Attributes:
        prompt: token ids.
        answer: token ids, one at least.
        beside: answer of as many tokens with which it shares its masks, so that what is left out of one is
            left out of the other and their difference is surer than either; None: its own.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    beside: tuple[int, ...] | None = None

    @property
    def seed(self) -> str:
        """Of its masks: by what is asked alone, so that any model, level and batch has the same."""
        answer = self.answer if self.beside is None else self.beside
        return digest({"prompt": list(self.prompt), "answer": list(answer)})


@dataclass(frozen=True)
class Row:
    """One set of masked tokens of a request.

    Attributes:
        request: its number.
        prompt: tokens of its prompt.
        tokens: the whole, with its masks.
        places: of the masked tokens among these.
        targets: the masked tokens.
        weight: of the row in its request's bound.
    """

    request: int
    prompt: int
    tokens: tuple[int, ...]
    places: tuple[int, ...]
    targets: tuple[int, ...]
    weight: float


def rows_of(number: int, request: Request, samples: int, mask_token: int) -> Iterator[Row]:
    """The rows whose weighted sum is a request's bound.

    Args:
        number: of the request.
        request: what is scored.
        samples: rows at most; see `mask_sets`.
        mask_token: id of the mask.
    """
    sets = mask_sets(len(request.answer), samples, request.seed)
    begin = len(request.prompt)
    answer = np.array(request.answer)
    for masked, weight in zip(sets.masked, sets.weights.tolist(), strict=True):
        hidden = np.flatnonzero(masked)
        yield Row(
            number,
            begin,
            (*request.prompt, *np.where(masked, mask_token, answer).tolist()),
            tuple((begin + hidden).tolist()),
            tuple(answer[hidden].tolist()),
            weight,
        )


def row_scores(
    denoise: Denoise,
    rows: Sequence[Sequence[Row]],
    *,
    mask_token: int,
    padding: int,
    guidance: float = 0.0,
    device: torch.device,
) -> list[tuple[float, bool]]:
    """What the masked tokens of some rows say.

    Args:
        denoise: the model.
        rows: of one batch; those that have the same prompt, tokens and places are given together, and run
            once.
        mask_token: id of the mask.
        padding: id that rows are filled up with.
        guidance: see `guided`.
        device: of the model.

    Returns:
        Of each row, in order, the sum of the log-probabilities of its masked tokens, and whether each of
        these is the likeliest.

    Raises:
        NumericalFailure: a sum is NaN or infinite.
    """
    firsts = [together[0] for together in rows]
    ids, valid = padded([row.tokens for row in firsts], padding, device)
    longest = ids.shape[1]
    where = np.array([n * longest + place for n, row in enumerate(firsts) for place in row.places])
    prompts = torch.tensor([row.prompt for row in firsts], device=device)
    prompt = torch.arange(longest, device=device) < prompts[:, None]
    asked = Asked(ids, valid, sent(where, device), prompt)
    pieces = guided(denoise, asked, guidance=guidance, mask_token=mask_token)
    ends = np.cumsum([len(row.places) for row in firsts])
    told = [
        np.arange(end - len(row.places), end)
        for end, together in zip(ends, rows, strict=True)
        for row in together
    ]
    flat = [row for together in rows for row in together]
    predicted = np.concatenate(told)
    targets = np.array([target for row in flat for target in row.targets])
    order = np.argsort(predicted, kind="stable")
    values, hits = np.empty(len(order)), np.empty(len(order), dtype=bool)
    found = fetched(likelihoods(pieces, predicted[order], targets[order]))
    values[order], hits[order] = found()
    places = np.cumsum([len(row.places) for row in flat])[:-1]
    sums = [math.fsum(own.tolist()) for own in np.split(values, places)]
    if not np.isfinite(sums).all():
        raise NumericalFailure("NaN or infinity in the logits")
    return [(one, bool(own.all())) for one, own in zip(sums, np.split(hits, places), strict=True)]


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
    rows = [
        row
        for number, request in enumerate(requests)
        for row in rows_of(number, request, samples, mask_token)
    ]
    parts: list[list[float]] = [[] for _ in requests]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        scores = row_scores(
            denoise,
            [[row] for row in batch],
            **{"mask_token": mask_token, "padding": padding},
            guidance=guidance,
            device=device,
        )
        for row, (score, _) in zip(batch, scores, strict=True):
            parts[row.request].append(row.weight * score)
    return [math.fsum(own) for own in parts]
