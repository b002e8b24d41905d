"""Requests in batches: nothing is lost, shared tokens stand once, and the order is settled."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_atlas.lm.forest import Batch, Request, pack

SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(1, 4)),
    min_size=1,
    max_size=30,
)


def make(sequences: list[tuple[list[int], int]]) -> list[Request]:
    """Requests whose owners are some of four documents."""
    return [
        Request(tokens, min(scored, len(tokens) - 1), i % 4)
        for i, (tokens, scored) in enumerate(sequences)
    ]


def ancestors(batch: Batch, place: int) -> list[int]:
    """Flat indices of a token's ancestors and itself, as the mask has it: who is seen."""
    longest = batch.tokens.shape[1]
    row, query = divmod(place, longest)
    return [row * longest + k for k in range(query + 1) if query < batch.ends[row, k]]


@pytest.mark.parametrize("share", [True, False])
@settings(deadline=None, max_examples=60)
@given(sequences=SEQUENCES, batch_size=st.integers(1, 5))
def test_every_request_is_there_as_it_was(
    sequences: list[tuple[list[int], int]], batch_size: int, share: bool
) -> None:
    requests = make(sequences)
    batches = pack(requests, batch_size, share=share)
    assert sorted(n for batch in batches for n in batch.requests) == list(range(len(requests)))
    longest = max(len(request.run) for request in requests)
    for batch in batches:
        flat, depth = batch.tokens.ravel(), batch.depth.ravel()
        assert batch.tokens.size <= batch_size * longest
        assert batch.branched <= share
        for i, number in enumerate(batch.requests):
            request = requests[number]
            path = ancestors(batch, batch.last[i])
            assert flat[path].tolist() == request.run
            assert depth[path].tolist() == list(range(len(request.run)))
            assert batch.run[i] == len(request.run)
            assert batch.documents[batch.owners[i]] == request.owner
            mine = slice(batch.firsts[i], batch.firsts[i] + request.scored)
            assert batch.scored[batch.row[mine]].tolist() == path[-request.scored :]
            assert batch.targets[mine].tolist() == request.tokens[-request.scored :]
            known = path[: batch.brought[i]]
            assert batch.known[i] == (known[-1] if known else -1)
        # Padding sees something, or its attention would be NaN, and no token sees it.
        for row, length in enumerate(batch.lengths):
            assert (batch.ends[row, length:] == np.arange(length, batch.tokens.shape[1]) + 1).all()


@settings(deadline=None, max_examples=60)
@given(sequences=SEQUENCES)
def test_each_token_of_a_document_is_new_once(sequences: list[tuple[list[int], int]]) -> None:
    requests = make(sequences)
    for share in (True, False):
        new = dict.fromkeys(range(4), 0)
        for batch in pack(requests, 3, share=share):
            for owner, run, brought in zip(batch.owners, batch.run, batch.brought, strict=True):
                new[batch.documents[owner]] += run - brought
        for owner, count in new.items():
            mine = [tuple(request.run) for request in requests if request.owner == owner]
            assert count == len({run[:n] for run in mine for n in range(1, len(run) + 1)})


def test_short_requests_fill_a_batch_as_longer_ones_would() -> None:
    requests = [Request([number, 1, 2], 1, 0) for number in range(40)]
    assert len(pack(requests, 4, share=False)) == 10
    assert len(pack(requests, 4, share=False, shortest=2)) == 10
    assert len(pack(requests, 4, share=False, shortest=16)) == 2


def question(options: int, context: int = 20, length: int = 4) -> list[Request]:
    """A context, and options that differ from their first token on."""
    shared = list(range(100, 100 + context))
    return [Request([*shared, *range(10 * i, 10 * i + length)], length, 0) for i in range(options)]


def test_the_context_of_a_question_is_run_once() -> None:
    (batch,) = pack(question(4), 16, share=True)
    assert batch.branched
    assert batch.tokens.shape == (1, 20 + 4 * 3)
    # Where the options begin, one row of logits predicts the first token of each.
    assert len(batch.scored) == 1 + 4 * 3
    assert len(batch.targets) == 4 * 4


def test_requests_that_run_the_same_share_a_row_without_branches() -> None:
    requests = [Request([5, 6, 7, last], 1, 0) for last in (1, 2, 3)]
    (batch,) = pack(requests, 4, share=False)
    assert batch.tokens.tolist() == [[5, 6, 7]]
    assert not batch.branched
    assert batch.targets.tolist() == [1, 2, 3]


def test_what_is_shared_must_be_worth_it() -> None:
    begin_alike = [Request([1, *range(start, start + 12)], 4, 0) for start in (20, 40)]
    (batch,) = pack(begin_alike, 4, share=True)
    assert not batch.branched
    assert batch.tokens.shape == (2, 12)


def test_a_row_does_not_grow_without_bound() -> None:
    requests = [
        Request([*range(100, 130), *random.Random(i).choices(range(9), k=9)], 3, i)
        for i in range(200)
    ]
    batches = pack(requests, 8, share=True)
    assert max(batch.tokens.shape[1] for batch in batches) <= 2 * 39
    assert sum(batch.tokens.size for batch in batches) < 0.5 * sum(len(r.run) for r in requests)


def test_longest_first_and_padded_little() -> None:
    draw = random.Random(3)
    requests = [
        Request([draw.randrange(90) for _ in range(draw.randint(5, 60))], 1, i) for i in range(300)
    ]
    batches = pack(requests, 4, share=True)
    sizes = [batch.tokens.shape[1] for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(batch.tokens.size for batch in batches) < 1.1 * sum(len(r.run) for r in requests)
    # As many tokens in each batch, so more rows where they are short.
    assert len(batches[-2].tokens) > 3 * len(batches[0].tokens)


def test_the_order_of_requests_changes_no_row() -> None:
    requests = [*question(3), Request([1, 2, 3], 1, 9), Request([7] * 30, 2, 8)]
    turned = requests[::-1]
    for one, other in zip(pack(requests, 2, share=True), pack(turned, 2, share=True), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
