"""Batches of requests in which tokens that several requests begin with are run once.

Requests that begin alike become a tree, and a tree becomes one row of a batch: its tokens depth-first,
each at the position that it has in its requests, seeing its own ancestors only. A row whose requests
do not branch is an ordinary sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsity_atlas.lm.trees import planting
from sparsity_atlas.lm.trees.planting import Forest
from sparsity_atlas.lm.trees.sequences import Sequences, pieces


class Request(NamedTuple):
    """A sequence to score.

    Attributes:
        tokens: ids; the last one is predicted, but not run.
        scored: how many tokens at the end are predicted.
        owner: the document that it belongs to, by number.
        counted: whether its tokens count as run; not where lm-eval reads it from another request's pass.
    """

    tokens: list[int]
    scored: int
    owner: int
    counted: bool = True

    @property
    def run(self) -> list[int]:
        """Tokens that go through the model."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        tokens: int64 [rows, longest], 0 where a row is shorter.
        lengths: int64 [rows].
        depth: int64 [rows, longest], position of each token in its requests.
        ends: int64 [rows, longest]: a token is seen by those behind it in its row, up to here.
        branched: whether any row is more than one sequence.
        requests: numbers of the requests in it.
        owners: of each of them, as an index into `documents`.
        documents: owners that occur, in ascending order.
        last: flat index [row * longest + column] of each request's last token.
        known: likewise, of its last token that its document has already brought; -1 for none.
        run: how many tokens each request runs.
        counted: int64 [requests], 1 where these tokens count as run, 0 where an equal request's do.
        brought: how many of them its document has already brought.
        scored: flat indices of the tokens whose successor is predicted, each once, ascending.
        row: for each prediction its index into `scored`.
        targets: for each prediction the token, request by request.
        firsts: index of each request's first prediction.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    depth: np.ndarray
    ends: np.ndarray
    branched: bool
    requests: list[int]
    owners: np.ndarray
    documents: list[int]
    last: np.ndarray
    known: np.ndarray
    run: np.ndarray
    counted: np.ndarray
    brought: np.ndarray
    scored: np.ndarray
    row: np.ndarray
    targets: np.ndarray
    firsts: np.ndarray


def times(batch: Batch) -> np.ndarray:
    """How often each token of a batch counts: int64 [2, rows, longest], 0 where padding is.

    First as often as it stands in a request that counts, then once for each document that it is new to:
    added up, what `Usage.tokens` says of `scoring` and `unique`.
    """
    rows, longest = batch.tokens.shape
    ends = np.zeros(
        (2, rows * longest + 1), np.int64
    )  # of requests, each behind its last token's place
    np.add.at(ends[0], batch.last + 1, batch.counted)
    np.add.at(ends[1], batch.last + 1, 1)
    np.subtract.at(ends[1], batch.known[batch.known >= 0] + 1, 1)
    before = ends.cumsum(1)
    # A token stands in the requests that end at it or at one of its descendants, which follow it.
    first = np.arange(rows * longest)
    last = (batch.ends + longest * np.arange(rows)[:, None]).ravel()
    found: np.ndarray = before[:, last] - before[:, first]
    return found.reshape(2, rows, longest)


def pack(
    requests: list[Request], batch_size: int, *, share: bool, shortest: int = 0
) -> list[Batch]:
    """Arrange requests in batches, longest row first, as the requests and the arguments alone say.

    A batch holds as many tokens, padding included, as `batch_size` of the longest request.

    Args:
        requests: in any order.
        batch_size: sequences of the longest batch.
        share: whether rows may branch; if not, only requests that run the same tokens share a row.
        shortest: tokens for which the longest request is taken, if it is shorter.
    """
    if not requests:
        return []
    sequences = Sequences(requests)
    budget = batch_size * max(shortest, int(sequences.lengths.max()))
    forest = planting.grow(sequences, budget, share=share)
    # Longest first: running out of memory shows at once.
    order = sorted(range(len(forest.sizes)), key=lambda tree: forest.sort_key(tree))
    batches = []
    while order:
        rows = max(budget // int(forest.sizes[order[0]]), 1)
        batches.append(_batch(forest, order[:rows], requests))
        order = order[rows:]
    return batches


def arranged(requests: list[Request], batches: list[list[list[int]]]) -> list[Batch]:
    """The batches that are given.

    Args:
        requests: in any order.
        batches: [batch][row][request], the longest row first; a row's requests run the same tokens.
    """
    forest = planting.rows(Sequences(requests), [row for batch in batches for row in batch])
    ends = np.cumsum([len(batch) for batch in batches]).tolist()
    return [
        _batch(forest, range(end - len(batch), end), requests)
        for batch, end in zip(batches, ends, strict=True)
    ]


def _batch(forest: Forest, trees: Sequence[int], requests: list[Request]) -> Batch:
    """A batch of these trees, the longest first."""
    longest = int(forest.sizes[trees[0]])
    shape = (len(trees), longest)
    tokens, depth = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    # Padding sees itself, since a softmax over nothing is NaN.
    ends = np.tile(np.arange(1, longest + 1), (len(trees), 1))
    for row, tree in enumerate(trees):
        nodes = forest.nodes(tree)
        length = nodes.stop - nodes.start
        tokens[row, :length] = forest.tokens[nodes]
        depth[row, :length] = forest.depth[nodes]
        ends[row, :length] = forest.ends[nodes]
    # Of the requests, by their places in the forest.
    of_trees = [forest.leaves(tree) for tree in trees]
    leaves = np.concatenate([np.arange(one.start, one.stop) for one in of_trees])
    starts = np.repeat(np.arange(len(trees)) * longest, [one.stop - one.start for one in of_trees])
    numbers = forest.requests[leaves].tolist()
    counts = forest.scored[leaves]
    predictions = pieces(forest.predictions, forest.firsts[leaves], counts)
    scored, row_of = np.unique(predictions + np.repeat(starts, counts), return_inverse=True)
    documents, owner_of = np.unique([requests[i].owner for i in numbers], return_inverse=True)
    known = forest.known[leaves]
    lengths = forest.sizes[list(trees)]
    return Batch(
        tokens=tokens,
        lengths=lengths,
        depth=depth,
        ends=ends,
        branched=bool((depth[np.arange(len(trees)), lengths - 1] != lengths - 1).any()),
        requests=numbers,
        owners=owner_of,
        documents=documents.tolist(),
        last=starts + forest.last[leaves],
        known=np.where(known >= 0, starts + known, -1),
        run=forest.run[leaves],
        counted=np.array([int(requests[i].counted) for i in numbers]),
        brought=forest.brought[leaves],
        scored=scored,
        row=row_of,
        targets=pieces(forest.targets, forest.firsts[leaves], counts),
        firsts=np.cumsum([0, *counts[:-1]]),
    )
