"""What a task's requests come to for a masked-diffusion model: rows with masks, in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, TypeVar

from sparsity_atlas.diffusion.likelihood import Request, Row, rows_of
from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.lm.work import Arranged, Limits, generation_batches, windows
from sparsity_atlas.models.memory import Largest
from sparsity_atlas.terms import DENOISING, SCORING

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.lm.work import Encoding
    from sparsity_atlas.terms import Phase

# Which set of masked tokens of which request: both by number.
Reading = tuple[int, int]
# Requests whose rows are kept: those of a batch lie side by side.
KEPT = 64

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowBatch:
    """One forward pass over rows of one document each.

    Attributes:
        rows: of each row what is read of it: options of one token read one row, and others may.
        owners: of each row its document.
        length: tokens of the longest.
    """

    rows: list[list[Reading]]
    owners: list[int]
    length: int


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

    def __post_init__(self) -> None:
        self._rows: Callable[[str, int], list[Row]] = lru_cache(KEPT)(self._made)

    @property
    def phases(self) -> list[Phase]:
        """What its passes are for."""
        scored: list[Phase] = [SCORING] if any(self.batches.values()) else []
        return scored + ([DENOISING] if self.prompts or self.greedy else [])

    def rows(self, kind: str, number: int) -> list[Row]:
        """The rows of a request, by its number among those of its kind that are scored."""
        return self._rows(kind, number)

    def _made(self, kind: str, number: int) -> list[Row]:
        return list(rows_of(number, self.scored[kind][number], self.samples, self.mask_token))


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
            parts = [
                windows(tokens, limits, limits.max_length - 1) for (tokens,) in encodings[kind]
            ]
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
    distinct: list[tuple[int, int, list[Reading]]] = []  # length, document, readings
    by_document: dict[int, list[int]] = {}
    for number, owner in enumerate(owners):
        by_document.setdefault(owner, []).append(number)
    for owner, numbers in by_document.items():
        known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[Reading]] = {}
        for number in numbers:
            for place, row in enumerate(work.rows(kind, number)):
                key = (row.prompt, row.tokens, row.places)
                known.setdefault(key, []).append((number, place))
        distinct += [(len(tokens), owner, own) for (_, tokens, _), own in known.items()]
    distinct.sort(key=lambda one: (-one[0], one[2][0]))
    return [
        RowBatch([own for *_, own in some], [owner for _, owner, _ in some], some[0][0])
        for some in _parted(distinct, [length for length, *_ in distinct], limits)
    ]


def _parted(items: Sequence[Item], lengths: Sequence[int], limits: Limits) -> list[list[Item]]:
    """Batches that hold as many tokens, padding included, as `batch_size` of the longest item.

    Args:
        items: the longest first.
        lengths: of them, in tokens.
        limits: of the model.
    """
    found, start = [], 0
    budget = limits.batch_size * max(limits.shortest, *lengths[:1], 1)
    while start < len(items):
        rows = max(budget // max(lengths[start], 1), 1)
        found.append(list(items[start : start + rows]))
        start += rows
    return found


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
        batches += _parted(numbers, lengths, limits)
    return batches


def _largest(work: MaskedWork, prompts: list[Instance], limits: Limits) -> Largest:
    found = Largest()

    def add(lengths: list[int], scored: int) -> None:
        nonlocal found
        rows, longest = len(lengths), max(lengths)
        # Where no row is padded, nobody needs a mask.
        pairs = rows * longest**2 if min(lengths) < longest else 0
        found |= Largest(rows * longest, longest, scored, pairs)

    for kind, batches in work.batches.items():
        requests = work.scored[kind]
        for batch in batches:
            firsts = [requests[readings[0][0]] for readings in batch.rows]
            add(
                [len(one.prompt) + len(one.answer) for one in firsts],
                sum(len(one.answer) for one in firsts),
            )
    for numbers in work.greedy:
        own = [work.scored["loglikelihood"][one] for one in numbers]
        add([len(one.prompt) + len(one.answer) for one in own], sum(len(o.answer) for o in own))
    for numbers in work.prompts:
        room = limits.room(prompts[numbers[0]])
        kept = max(limits.max_length - room, 0)
        add([min(work.lengths[one], kept) + room for one in numbers], len(numbers) * room)
    return found
