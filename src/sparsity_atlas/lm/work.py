"""What a task's requests come to: batches, the same for every node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lm_eval import utils
from lm_eval.models.utils import normalize_gen_kwargs

from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.lm import collate, forest
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.models.memory import Largest
from sparsity_atlas.terms import GENERATION, PROMPT, SCORING

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.terms import Phase

# Token ids of one request of lm-eval's: context and continuation, a prompt, or a whole document, perhaps with
# what is put before it.
Encoding = tuple[list[int], ...]

# What generation behind a prompt is worth, in positions: roughly, for what share of a task is done.
ROOM = 1000


@dataclass
class Arranged:
    """A task's requests in batches, as far as all kinds of models have it in common.

    Attributes:
        documents: (task, document) in the order of the requests.
        owners: of each kind's requests, as indices into `documents`.
        windows: for each window of a whole document the number of its request.
        prompts: batches of generation, as numbers of requests.
        lengths: tokens of each prompt, before it is cut.
        cut: of each document the tokens at the beginning that its longest scored request lost.
        abilities: how the batches are run, by what the model was seen to do right.
        largest: of all batches.
        likelihood: what the nats of whole documents are: a `loss`, or a `bound` of one.
    """

    documents: list[tuple[str, int]] = field(default_factory=list)
    owners: dict[str, list[int]] = field(default_factory=dict)
    windows: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    abilities: Abilities = field(default_factory=Abilities)
    largest: Largest = field(default_factory=Largest)
    likelihood: ClassVar[str] = "loss"

    @property
    def phases(self) -> list[Phase]:
        """What its passes are for."""
        raise NotImplementedError

    @property
    def positions(self) -> list[int]:
        """Of each batch the positions, padding included, in the order in which they are run."""
        raise NotImplementedError

    def of_prompts(self) -> list[int]:
        """Positions of each batch of prompts."""
        return [
            len(some) * (ROOM + max(self.lengths[one] for one in some)) for some in self.prompts
        ]


@dataclass
class Work(Arranged):
    """A task's requests in batches of a causal model.

    Attributes:
        batches: of each kind of request that is scored.
    """

    batches: dict[str, list[forest.Batch]] = field(default_factory=dict)

    @property
    def phases(self) -> list[Phase]:
        """What its passes are for."""
        scored: list[Phase] = [SCORING] if any(self.batches.values()) else []
        return scored + ([PROMPT, GENERATION] if self.prompts else [])

    @property
    def positions(self) -> list[int]:
        """See `Arranged.positions`."""
        scored = [batch.tokens.size for some in self.batches.values() for batch in some]
        return scored + self.of_prompts()

    @property
    def first(self) -> forest.Batch | None:
        """The first batch of what is scored; None where nothing is."""
        return next((some[0] for some in self.batches.values() if some), None)

    @property
    def branching(self) -> bool:
        """Whether rows are more than one sequence."""
        return any(batch.branched for batches in self.batches.values() for batch in batches)

    def last_prompts(self) -> set[int]:
        """Of each document's prompts the one that is run last, which `Usage` takes for `unique`."""
        owners = self.owners["generate_until"]
        return set({owners[one]: one for prompts in self.prompts for one in prompts}.values())


@dataclass(frozen=True)
class Limits:
    """Settings of a model that batches depend on.

    Attributes:
        batch_size: sequences of a batch.
        max_length: longest sequence in tokens.
        prefix_token: which the first token of a whole document is predicted from.
        max_gen_toks: generated at most where a task says nothing.
        shortest: see `forest.pack`.
    """

    batch_size: int
    max_length: int
    prefix_token: int | None
    max_gen_toks: int = 256
    shortest: int = 0

    def room(self, request: Instance) -> int:
        """Tokens that may be generated."""
        room: int = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
        return room


class Scored(NamedTuple):
    """What is scored of a task, by kind: requests as they are run, and as lm-eval has them."""

    requests: dict[str, list[forest.Request]]
    pairs: dict[str, list[collate.Pair]]


def arrange(
    requests: dict[str, list[Instance]],
    encodings: dict[str, list[Encoding]],
    limits: Limits,
    abilities: Callable[[list[forest.Request], bool], Abilities],
    *,
    share: bool,
) -> Work:
    """Arrange a task's requests.

    Args:
        requests: by kind (lm-eval's request type).
        encodings: of the same.
        limits: of the model.
        abilities: finds out what the model does right with some requests, whose rows branch or do not.
        share: whether rows may branch, if the model can do it.

    Raises:
        TaskFailure: a request that cannot be scored.
    """
    work, scored = arranged(requests, encodings, limits, share=share)
    branching = work.branching
    work.abilities = abilities(
        [one for some in scored.requests.values() for one in some], branching
    )
    for kind, some in scored.requests.items():
        if work.abilities.follows:
            rolling = kind == "loglikelihood_rolling"
            batches = collate.lm_eval_batches(
                scored.pairs[kind], limits.batch_size, rolling=rolling
            )
            work.batches[kind] = forest.arranged(some, batches)
        elif branching and not work.abilities.branches:
            work.batches[kind] = _packed(some, limits, share=False)
    work.largest = _largest(work, requests.get("generate_until", []), limits)
    return work


def arranged(
    requests: dict[str, list[Instance]],
    encodings: dict[str, list[Encoding]],
    limits: Limits,
    *,
    share: bool,
) -> tuple[Work, Scored]:
    """As much of `arrange` as follows without the model, and what it was made of."""
    every = [(one.task_name, one.doc_id) for some in requests.values() for one in some]
    work = Work(documents=list(dict.fromkeys(every)))
    work.cut = [0] * len(work.documents)
    number = {document: row for row, document in enumerate(work.documents)}
    scored = Scored({}, {})
    for kind, some in requests.items():
        owners = [number[one.task_name, one.doc_id] for one in some]
        work.owners[kind] = owners
        if kind == "generate_until":
            work.prompts = generation_batches(some, encodings[kind], limits.batch_size)
            work.lengths = [len(tokens) for (tokens,) in encodings[kind]]
            continue
        if kind == "loglikelihood_rolling":
            parts = [behind(limits, limits.max_length, *encoding) for encoding in encodings[kind]]
            work.windows = [i for i, own in enumerate(parts) for _ in own]
            pairs = [window for own in parts for window in own]
            asked = [(some[i], owners[i]) for i in work.windows]
            counted = [True] * len(asked)
        else:
            pairs = [(context, continuation) for context, continuation in encodings[kind]]
            asked = list(zip(some, owners, strict=True))
            counted = _first_of_equals(pairs)
            for owner, (context, continuation) in zip(owners, pairs, strict=True):
                lost = len(context) + len(continuation) - (limits.max_length + 1)
                work.cut[owner] = max(work.cut[owner], lost)
        scored.pairs[kind] = pairs
        scored.requests[kind] = [
            _request(one, *pair, owner, limits.max_length, counts)
            for (one, owner), pair, counts in zip(asked, pairs, counted, strict=True)
        ]
    work.batches = {
        kind: _packed(some, limits, share=share) for kind, some in scored.requests.items()
    }
    work.largest = _largest(work, requests.get("generate_until", []), limits)
    return work, scored


def _packed(requests: list[forest.Request], limits: Limits, *, share: bool) -> list[forest.Batch]:
    return forest.pack(requests, limits.batch_size, share=share, shortest=limits.shortest)


def _largest(work: Work, prompts: list[Instance], limits: Limits) -> Largest:
    found = Largest()
    for batch in (one for batches in work.batches.values() for one in batches):
        rows, longest = batch.tokens.shape
        pairs = rows * longest**2 if batch.branched else 0
        found |= Largest(rows * longest, longest, len(batch.scored), pairs)
    for own in work.prompts:
        rows, longest = len(own), min(max(work.lengths[i] for i in own), limits.max_length)
        room = max(limits.room(prompts[i]) for i in own)
        kept = rows * min(longest + room, limits.max_length)
        found |= Largest(rows * longest, longest, rows, kept=kept)
    return found


def behind(
    limits: Limits, length: int, tokens: list[int], opening: Sequence[int] = ()
) -> list[tuple[list[int], list[int]]]:
    """As `windows`, of which the first follows tokens that are not scored.

    Raises:
        TaskFailure: these leave no room.
    """
    if len(opening) >= length:
        raise TaskFailure(
            f"inserted: {len(opening)} tokens before a document, of which the model takes {length}; "
            "insert fewer"
        )
    found = windows(tokens, limits, length - len(opening))
    return [(context + list(opening), own) for context, own in found[:1]] + found[1:]


def windows(tokens: list[int], limits: Limits, length: int) -> list[tuple[list[int], list[int]]]:
    """A whole document as pairs of context and continuation.

    Args:
        tokens: of the document.
        limits: of the model.
        length: tokens of a continuation at most.
    """
    return [
        utils.make_disjoint_window(window)
        for window in utils.get_rolling_token_windows(
            token_list=tokens,
            prefix_token=limits.prefix_token,
            max_seq_len=length,
            context_len=1,
        )
    ]


def _first_of_equals(pairs: list[collate.Pair]) -> list[bool]:
    """Whether each request is the first that runs its tokens: lm-eval answers the others with it.

    Windows of whole documents are no such requests: which of them lm-eval merges, if any, depends on
    the batch size, and at batch size 1 it merges none.
    """
    seen: set[tuple[int, ...]] = set()
    first = []
    for pair in pairs:
        run = collate.run_tokens(pair)
        first.append(run not in seen)
        seen.add(run)
    return first


def _request(
    request: Instance,
    context: list[int],
    continuation: list[int],
    owner: int,
    max_length: int,
    counted: bool,
) -> forest.Request:
    fault = None
    if not continuation:
        fault = (
            f"nothing to score: {request.args[1]!r} comes to no token of its own after its context, "
            "with whose end the tokenizer joins it"
        )
    elif not context:
        fault = f"the context {request.args[0]!r} comes to no token that the answer could follow"
    elif len(continuation) > max_length:
        fault = f"max_length: {len(continuation)} tokens to score, at most {max_length} can be"
    if fault:
        raise TaskFailure(f"'{request.task_name}', document {request.doc_id}: {fault}")
    # As HFLM cuts it; the last token is not run.
    tokens = (context + continuation)[-(max_length + 1) :]
    return forest.Request(tokens, len(continuation), owner, counted)


def generation_batches(
    requests: list[Instance], encodings: list[Encoding], batch_size: int
) -> list[list[int]]:
    """Batches of generation: requests with the same options, longest first."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(repr(request.args[1]), []).append(index)
    batches = []
    for group in groups.values():
        # HFLM sorts by the same key, so that a batch's rows stay in the order given here.
        group.sort(key=lambda index: (-len(encodings[index][0]), requests[index].args[0]))
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches
