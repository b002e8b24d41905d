"""Requests whose bound is asked for, and what a batch of their rows looks like: answers, partly masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsity_atlas.diffusion.mask_sets import MaskSets, mask_sets
from sparsity_atlas.files.whole import digest


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

    @cached_property
    def seed(self) -> str:
        """Of its masks: by what is asked alone, so that any model, level and batch has the same."""
        answer = self.answer if self.beside is None else self.beside
        return digest({"prompt": list(self.prompt), "answer": list(answer)})

    def sets(self, samples: int) -> MaskSets:
        """The sets of its masked tokens; each is a row. See `mask_sets`."""
        return mask_sets(len(self.answer), samples, self.seed)


@dataclass(frozen=True)
class Rows:
    """Rows of one batch, and what is read of them: a reading is one set of masked tokens of one request.

    Attributes:
        tokens: int64 [rows, longest], masks among them, and padding behind each row.
        lengths: int64 [rows], tokens without padding.
        prompts: int64 [rows], tokens of the prompt.
        where: int64 [places], indices into the flattened batch: the masked tokens, row by row.
        predicted: int64 [targets], of each token that is read its place among `where`.
        targets: int64 [targets], that token, reading by reading.
        starts: int64 [readings], the first target of each reading; each has one at least.
        weights: float64 [readings], of its request's bound.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    where: np.ndarray
    predicted: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    weights: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """What is no padding, bool [rows, longest]."""
        found: np.ndarray = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return found


def rows_of(
    requests: Sequence[Request],
    number: np.ndarray,
    place: np.ndarray,
    row: np.ndarray,
    *,
    samples: int,
    mask_token: int,
    padding: int,
) -> Rows:
    """The rows that some readings ask for.

    Args:
        requests: of which some are read.
        number: int64 [readings], of the request.
        place: int64 [readings], of the set among those of the request.
        row: int64 [readings], from 0 on and never falling: which row tells it. Those of one row have the
            same prompt, tokens and masks.
        samples: rows of a request at most; see `mask_sets`.
        mask_token: id of the mask.
        padding: id that rows are filled up with.
    """
    own = [requests[one] for one in number.tolist()]
    firsts = np.flatnonzero(np.diff(row, prepend=-1))
    prompts = np.array([len(own[one].prompt) for one in firsts])
    lengths = prompts + [len(own[one].answer) for one in firsts]
    longest = int(lengths.max())
    tokens = np.full((len(firsts), longest), padding)
    weights = np.empty(len(own))
    found = []
    for one in np.unique(number).tolist():
        request, readings = requests[one], np.flatnonzero(number == one)
        sets = request.sets(samples)
        masked, rows = sets.masked[place[readings]], row[readings]
        answer, begin = np.array(request.answer), len(request.prompt)
        tokens[rows, :begin] = request.prompt
        tokens[rows, begin : begin + len(answer)] = np.where(masked, mask_token, answer)
        weights[readings] = sets.weights[place[readings]]
        reading, hidden = np.nonzero(masked)
        found.append((readings[reading], begin + hidden, answer[hidden]))
    reading, column, target = (np.concatenate(some) for some in zip(*found, strict=True))
    order = np.argsort(reading, kind="stable")
    reading, column, target = reading[order], column[order], target[order]
    starts = np.searchsorted(reading, np.arange(len(own)))
    # Where a row is read several times, the first reading says which of its tokens are wanted.
    first = np.isin(reading, firsts)
    begins = np.searchsorted(row[reading[first]], np.arange(len(firsts)))
    return Rows(
        tokens=tokens,
        lengths=lengths,
        prompts=prompts,
        where=row[reading[first]] * longest + column[first],
        predicted=begins[row[reading]] + np.arange(len(reading)) - starts[reading],
        targets=target,
        starts=starts,
        weights=weights,
    )
