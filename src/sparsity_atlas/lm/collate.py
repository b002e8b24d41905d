"""The batches that lm-eval's Hugging Face model makes of its requests, in its order."""

from __future__ import annotations

from collections import defaultdict

from lm_eval.models.utils import Collator

# Token ids of a context and of what is scored behind it.
Pair = tuple[list[int], list[int]]


def run_tokens(pair: Pair) -> tuple[int, ...]:
    """The tokens of a request that go through the model, before they are cut to its context."""
    context, continuation = pair
    return (*context, *continuation[:-1])


def lm_eval_batches(pairs: list[Pair], batch_size: int, *, rolling: bool) -> list[list[list[int]]]:
    """Arrange requests as `HFLM._loglikelihood_tokens` does.

    Args:
        pairs: of the requests.
        batch_size: rows of a batch.
        rolling: whether they are windows of whole documents, which `HFLM.loglikelihood_rolling` hands
            over in batches already.

    Returns:
        [batch][row][request]: the numbers of the requests that a row answers.
    """
    step = batch_size if rolling else max(len(pairs), 1)
    found = []
    for start in range(0, len(pairs), step):
        requests = [(number, *pairs[number]) for number in range(len(pairs))[start : start + step]]
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, context, continuation in requests:
            rows[run_tokens((context, continuation))].append(number)
        collator = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), (*request[1], *request[2])),
            group_by="contexts",
            group_fn=lambda request: run_tokens(request[1:]),
        )
        found += [
            [rows[run_tokens(pair)] for _, *pair in batch]
            for batch in collator.get_batched(n=batch_size)
        ]
    return found
