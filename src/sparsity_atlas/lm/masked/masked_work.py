"""What a task's requests come to for a masked-diffusion model: rows with masks, in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparsity_atlas.diffusion.rows import Request, Rows, rows_of
from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.lm.work import Arranged, Limits, behind, generation_batches
from sparsity_atlas.models.memory import Largest
from sparsity_atlas.terms import DENOISING, SCORING

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.lm.work import Encoding
    from sparsity_atlas.terms import Phase


@dataclass(frozen=True)
class RowBatch:
    """One forward pass over rows of one document each.

    Attributes:
        owners: int64 [rows], of each row its document.
        number: int64 [readings], of the request that is read; options of one token read one row, and others
            may.
        place: int64 [readings], of the set of masked tokens among those of the request.
        row: int64 [readings], which row tells it, from 0 on.
    """

    owners: np.ndarray
    number: np.ndarray
    place: np.ndarray
    row: np.ndarray


@dataclass
class MaskedWork(Arranged):
    """A task's requests in batches of a masked-diffusion model.

    Attributes:
        scored: what is scored, of each kind of request; of whole documents their windows.
        batches: of rows, of each kind of request that is scored.
        greedy: batches of requests of which it is asked whether they are what the model would say.
        asked: tokens of each prompt, before it is cut.
        samples: rows of a request at most.
        mask_token: id of the mask.
        exact: whether each bound is no estimate.
    """

    scored: dict[str, list[Request]] = field(default_factory=dict)
    batches: dict[str, list[RowBatch]] = field(default_factory=dict)
    greedy: list[list[int]] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)
    samples: int = 1
    mask_token: int = 0
    likelihood: ClassVar[str] = "bound"

    @property
    def phases(self) -> list[Phase]:
        """What its passes are for."""
        scored: list[Phase] = [SCORING] if any(self.batches.values()) else []
        return scored + ([DENOISING] if self.prompts or self.greedy else [])

    @property
    def positions(self) -> list[int]:
        """See `Arranged.positions`."""
        longest = {
            kind: [len(one.prompt) + len(one.answer) for one in some]
            for kind, some in self.scored.items()
        }
        scored = [
            len(batch.owners) * max(longest[kind][one] for one in batch.number.tolist())
            for kind, batches in self.batches.items()
            for batch in batches
        ]
        # As many passes as the answer has tokens.
        said = [
            sum(
                longest["loglikelihood"][one] * len(self.scored["loglikelihood"][one].answer)
                for one in some
            )
            for some in self.greedy
        ]
        return [*scored, *said, *self.of_prompts()]

    def rows(self, kind: str, batch: RowBatch, padding: int) -> Rows:
        """The rows of a batch.

        Args:
            kind: of its requests.
            batch: one of `batches`.
            padding: id that rows are filled up with.
        """
        return rows_of(
            *(self.scored[kind], batch.number, batch.place, batch.row),
            samples=self.samples,
            mask_token=self.mask_token,
            padding=padding,
        )


def arrange_rows(
    requests: dict[str, list[Instance]],
    encodings: dict[str, list[Encoding]],
    limits: Limits,
    *,
    samples: int,
    mask_token: int,
    greedy: Container[str] | None,
) -> MaskedWork:
    """Arrange a task's requests.

    Args:
        requests: by kind (lm-eval's request type).
        encodings: of the same.
        limits: of the model.
        samples: rows of a request at most.
        mask_token: id of the mask.
        greedy: see `JournalledLM.work`.

    Raises:
        TaskFailure: a request that cannot be scored.
    """
    every = [(one.task_name, one.doc_id) for some in requests.values() for one in some]
    work = MaskedWork(documents=list(dict.fromkeys(every)), samples=samples, mask_token=mask_token)
    work.cut = [0] * len(work.documents)
    number = {document: row for row, document in enumerate(work.documents)}
    for kind, some in requests.items():
        owners = [number[one.task_name, one.doc_id] for one in some]
        work.owners[kind] = owners
        if kind == "generate_until":
            work.asked = [tokens for (tokens,) in encodings[kind]]
            work.lengths = [len(tokens) for tokens in work.asked]
            work.prompts = generation_batches(some, encodings[kind], limits.batch_size)
            continue
        if kind == "loglikelihood_rolling":
            # A window's prompt is the token before it, which is run with it.
            length = limits.max_length - 1
            parts = [behind(limits, length, *encoding) for encoding in encodings[kind]]
            work.windows = [i for i, own in enumerate(parts) for _ in own]
            work.scored[kind] = [Request(tuple(c), tuple(a)) for own in parts for c, a in own]
            owners = [owners[i] for i in work.windows]
        else:
            asked = [
                _request(request, context, answer, limits.max_length)
                for request, (context, answer) in zip(some, encodings[kind], strict=True)
            ]
            work.scored[kind] = _sharing_masks(asked, owners)
            for owner, (context, answer) in zip(owners, encodings[kind], strict=True):
                lost = len(context) + len(answer) - limits.max_length
                work.cut[owner] = max(work.cut[owner], lost)
            work.greedy = _asked_greedy(work, some, limits, greedy)
        work.batches[kind] = _row_batches(work, kind, owners, limits)
    work.largest = _largest(work, requests.get("generate_until", []), limits)
    return work


def _request(request: Instance, context: list[int], answer: list[int], max_length: int) -> Request:
    fault = None
    if not answer:
        fault = (
            f"nothing to score: {request.args[1]!r} comes to no token of its own after its context, "
            "with whose end the tokenizer joins it"
        )
    elif len(answer) > max_length:
        fault = f"max_length: {len(answer)} tokens to score, at most {max_length} can be"
    if fault:
        raise TaskFailure(f"'{request.task_name}', document {request.doc_id}: {fault}")
    left = max_length - len(answer)
    return Request(tuple(context[-left:] if left else ()), tuple(answer))


def _sharing_masks(requests: list[Request], owners: list[int]) -> list[Request]:
    """Requests among which a document's options, after the same prompt and equally long, have the same masks.

    Which option is the likeliest then depends little on the masks that are drawn: sentences that differ in a
    word share what the sample says of all others.
    """
    groups = [
        (owner, one.prompt, len(one.answer)) for owner, one in zip(owners, requests, strict=True)
    ]
    firsts: dict[tuple[int, tuple[int, ...], int], tuple[int, ...]] = {}
    for group, one in zip(groups, requests, strict=True):
        firsts[group] = min(firsts.get(group, one.answer), one.answer)
    return [replace(one, beside=firsts[group]) for group, one in zip(groups, requests, strict=True)]


def _row_batches(work: MaskedWork, kind: str, owners: list[int], limits: Limits) -> list[RowBatch]:
    """Rows of all requests of a kind, the longest first; what a document runs twice is run once."""
    requests = work.scored[kind]
    if not requests:
        return []
    number, place, twin = (np.concatenate(some) for some in _readings(work, kind, owners))
    # Rows by the first of their readings: the longest, then in the order of the requests.
    lengths = np.array([len(one.prompt) + len(one.answer) for one in requests])
    own = np.flatnonzero(twin == np.arange(len(twin)))
    own = own[np.lexsort([place[own], number[own], -lengths[number[own]]])]
    rank = np.empty(len(twin), np.int64)
    rank[own] = np.arange(len(own))
    rank = rank[twin]
    order = np.lexsort([place, number, rank])
    number, place, rank = number[order], place[order], rank[order]
    document = np.array(owners)
    batches = []
    for start, end in _parted(lengths[number[np.searchsorted(rank, np.arange(len(own)))]], limits):
        some = slice(*np.searchsorted(rank, [start, end]))
        firsts = number[some][np.diff(rank[some], prepend=-1) > 0]
        batches.append(RowBatch(document[firsts], number[some], place[some], rank[some] - start))
    return batches


def _readings(
    work: MaskedWork, kind: str, owners: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers, places and twins of all readings: a twin is the first reading that the same row tells."""
    groups: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    for number, (owner, one) in enumerate(zip(owners, work.scored[kind], strict=True)):
        groups.setdefault((owner, one.prompt, len(one.answer)), []).append(number)
    found, done = [], 0
    for numbers in groups.values():
        requests = [work.scored[kind][number] for number in numbers]
        sets = [one.sets(work.samples) for one in requests]
        sizes = [len(one.weights) for one in sets]
        place = np.concatenate([np.arange(size) for size in sizes])
        twin = np.arange(len(place))
        if len(numbers) > 1 or not sets[0].exact:
            # Where a mask stands the row differs from that of any token, the mask's own among them.
            tokens = np.concatenate(
                [
                    np.where(own.masked, -1, np.array(one.answer))
                    for own, one in zip(sets, requests, strict=True)
                ]
            )
            twin = _firsts(tokens)
        found.append((np.repeat(numbers, sizes), place, done + twin))
        done += len(place)
    return zip(*found, strict=True)


def _firsts(rows: np.ndarray) -> np.ndarray:
    """Of each row of integers the first that equals it: int64 [rows]."""
    # Sums with random factors differ where rows do, nearly always; one number is sorted faster than a row.
    factors = np.random.default_rng(0).integers(1 << 62, size=rows.shape[1])
    _, first, inverse = np.unique(rows @ factors, return_index=True, return_inverse=True)
    if not np.array_equal(rows[first[inverse]], rows):
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    found: np.ndarray = first[inverse.reshape(-1)]
    return found


def _parted(lengths: Sequence[int] | np.ndarray, limits: Limits) -> Iterator[tuple[int, int]]:
    """Batches that hold as many tokens, padding included, as `batch_size` of the longest item.

    Args:
        lengths: of all items in tokens, the longest first.
        limits: of the model.

    Yields:
        Of each batch its first item, and the one after its last.
    """
    start = 0
    budget = limits.batch_size * max(limits.shortest, *lengths[:1], 1)
    while start < len(lengths):
        end = min(start + max(int(budget // max(lengths[start], 1)), 1), len(lengths))
        yield start, end
        start = end


def _asked_greedy(
    work: MaskedWork, some: list[Instance], limits: Limits, greedy: Container[str] | None
) -> list[list[int]]:
    """Batches of requests that are compared with what the model would say: of equally long answers.

    Where the answer is one token, its one row tells.
    """
    groups: dict[int, list[int]] = {}
    scored, owners = work.scored["loglikelihood"], work.owners["loglikelihood"]
    answers = Counter(owners)
    for number, (request, own) in enumerate(zip(some, scored, strict=True)):
        asked = answers[owners[number]] == 1 if greedy is None else request.task_name in greedy
        if len(own.answer) > 1 and asked:
            groups.setdefault(len(own.answer), []).append(number)
    batches = []
    for _, numbers in sorted(groups.items()):
        numbers.sort(key=lambda one: (-len(scored[one].prompt), one))
        lengths = [len(scored[one].prompt) + len(scored[one].answer) for one in numbers]
        batches += [numbers[start:end] for start, end in _parted(lengths, limits)]
    return batches


def _largest(work: MaskedWork, prompts: list[Instance], limits: Limits) -> Largest:
    found = Largest()

    def add(lengths: np.ndarray | list[int], scored: int) -> None:
        nonlocal found
        rows, longest = len(lengths), int(max(lengths))
        # Where no row is padded, nobody needs a mask.
        pairs = rows * longest**2 if min(lengths) < longest else 0
        found |= Largest(rows * longest, longest, scored, pairs)

    for kind, batches in work.batches.items():
        answers = np.array([len(one.answer) for one in work.scored[kind]])
        lengths = answers + [len(one.prompt) for one in work.scored[kind]]
        for batch in batches:
            own = batch.number[np.flatnonzero(np.diff(batch.row, prepend=-1))]
            add(lengths[own], int(answers[own].sum()))
    for numbers in work.greedy:
        asked = [work.scored["loglikelihood"][one] for one in numbers]
        add([len(o.prompt) + len(o.answer) for o in asked], sum(len(o.answer) for o in asked))
    for numbers in work.prompts:
        room = limits.room(prompts[numbers[0]])
        kept = max(limits.max_length - room, 0)
        add([min(work.lengths[one], kept) + room for one in numbers], len(numbers) * room)
    return found
