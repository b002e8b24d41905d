"""HFLM whose batches are recorded as they are finished, and counted: what models of all kinds share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from sparsity_atlas.lm.prompts import PromptLM
from sparsity_atlas.lm.usage import Usage
from sparsity_atlas.lm.work import Limits
from sparsity_atlas.loading import free_memory
from sparsity_atlas.loading.placement import tightest
from sparsity_atlas.models.memory import of_a_pass

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.lm.kept.kept_work import Keep
    from sparsity_atlas.lm.work import Arranged, Encoding
    from sparsity_atlas.models.memory import Largest, Sizes
    from sparsity_atlas.sparsify.attach import Counter

# Short requests are batched as if they had so many tokens: a GPU that is handed a few at a time waits for
# the host, which takes as long to start a pass of a small model over a thousand tokens as over ten thousand.
# More of a narrower model, whose tokens take less memory and time, up to the second number.
SHORTEST, MOST = {"cuda": 1024}, 4096
# Batches that a device gets before the one in front of them is read, so that it need not wait for the host.
AHEAD = {"cuda": 1}
# Width of the residual stream up to which it is more: half as wide, twice as many.
WIDE = 4096


# Waits for a batch that was begun, and makes its record.
Wait = Callable[[], Any]
Begin = Callable[[], Wait]
_Batch = TypeVar("_Batch")


class Records(Protocol):
    """What finished batches left, in order: a `Journal`, or what lasts as long as the process."""

    records: list[Any]

    def append(self, record: Any) -> None:
        """Add what a batch left."""


class Early(NamedTuple):
    """A batch that was begun before its task, and what waits for it."""

    work: Arranged
    batch: object
    wait: Wait


def _at_once(begin: Begin) -> Any:
    return begin()()


def shortest(device: str, hidden: int, max_length: int) -> int:
    """Tokens that the requests of a batch are taken to have at least.

    Args:
        device: its kind.
        hidden: width of the model's residual stream.
        max_length: longest sequence of the model in tokens.
    """
    least = SHORTEST.get(device, 0)
    while 0 < least < MOST and 2 * hidden <= WIDE:
        least, hidden = 2 * least, 2 * hidden
    return min(least, max_length)


class JournalledLM(PromptLM):
    """HFLM over a loaded model, whose batches are journalled and counted.

    The order of batches depends on the requests and the batch size alone, so a journal of an earlier run
    continues at a batch boundary.

    Attributes:
        usage: what each document cost, since `start`.
        sizes: of the model, by which it is seen before a task whether it fits; None: nobody looks.
        following: gives the task that is run after the one in hand, at the same sites, if it is ready: its
            first batch is begun before the last one of the task in hand is read.
        fitting: further tasks, all of which are to fit before the next one starts.
        ran: is told of each batch how many of the task have been run, and whether this one was now, not
            before an interruption.
        tries: whether requests may be built, and the model run to see what it does right.
    """

    usage: Usage
    _counter: Counter

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        """See `PromptLM`."""
        super().__init__(model, tokenizer, **options)
        # Of a model that names none, as of a wide one.
        self._hidden: int = getattr(model.config.get_text_config(), "hidden_size", None) or WIDE
        self.sizes: Sizes | None = None
        self.following: Callable[[], Arranged | None] = lambda: None
        self.fitting: Sequence[Arranged] = ()
        self.ran: Callable[[int, bool], None] = lambda count, now: None
        self.tries = True
        self._fits = 0  # bytes that were seen to be there
        self._early: Early | None = None

    @property
    def shortest(self) -> int:
        """Tokens that the requests of a batch are taken to have at least; see `forest.pack`."""
        return shortest(self.device.type, self._hidden, self.max_length)

    @property
    def limits(self) -> Limits:
        """Settings that batches depend on."""
        return Limits(
            self.batch_size,
            self.max_length,
            self.prefix_token_id,
            self.max_gen_toks,
            self.shortest,
        )

    def remember(self, digest: str) -> None:
        """Keep what is found out about the model for other processes, if anything is.

        Args:
            digest: of the model's files.
        """

    def work(
        self,
        requests: dict[str, list[Instance]],
        encodings: Callable[[], dict[str, list[Encoding]]],
        *,
        share: bool = True,
        greedy: Container[str] | None = None,
        keep: Keep | None = None,
    ) -> Arranged:
        """Arrange a task's requests in batches.

        Args:
            requests: by kind.
            encodings: gives what `encode` gives of them, by kind.
            share: whether requests may share what they have in common, where the model can.
            greedy: the tasks that ask whether an answer is the likeliest, where that costs further passes;
                None: those that score one answer a document, since a choice goes by its likelihoods.
            keep: where what was arranged is kept for other processes; None: nowhere.
        """
        raise NotImplementedError

    def arrange_ahead(
        self,
        requests: dict[str, list[Instance]],
        encodings: Callable[[], dict[str, list[Encoding]]],
        keep: Keep,
    ) -> None:
        """Keep as much of `work` for other processes as follows without the model, if anything does.

        Args:
            requests: as of `work`.
            encodings: likewise.
            keep: where it is kept.
        """

    def start(self, journal: Records, counter: Counter, work: Arranged) -> None:
        """Begin a task: answer from `journal` what it holds, compute and record the rest.

        Raises:
            AtlasError: its batches do not fit into the memory that there is, or those of one of `fitting`.
        """
        if self._early is not None and self._early.work is not work:
            self._early = None
        own = [work] if self._early is None else []
        self._check_room([*own, *self.fitting], counter)
        self.fitting = ()
        self._journal = journal
        self._counter = counter
        self._replayed = 0
        self.usage = Usage(work, counter)

    def _beside(self, work: Arranged, counter: Counter, batch: Largest) -> int:
        """Bytes that a batch takes beside its passes."""
        return 0

    def _check_room(self, works: Sequence[Arranged], counter: Counter) -> None:
        """See that the largest of some tasks fits; what makes it fit makes the others.

        Nobody looks again at what takes no more than what was seen to fit: what earlier passes took stays
        with a CPU's allocator, where later ones find it, and looks as if it were used.
        """
        if self.sizes is None or not works:
            return
        sizes, device = self.sizes, tightest(self.model)

        def needed(work: Arranged, share: float = 1.0) -> int:
            batch = work.largest.shrunk(share)
            item, slots = self.model.dtype.itemsize, len(counter.slots)
            own = of_a_pass(sizes, batch, item, device.type, slots)
            return own + self._beside(work, counter, batch)

        largest = max(works, key=needed)
        if (most := needed(largest)) <= self._fits:
            return

        def wanted(share: float) -> int:
            """By a share of a batch: what is named as fitting is to fit where the peak is off by as much."""
            return int(needed(largest, share) * (free_memory.TRUSTED if share < 1 else 1))

        free_memory.check(
            device,
            wanted,
            f"'{largest.documents[0][0]}': batches of {largest.largest.tokens:,} tokens",
            (("batch_size", self.batch_size), ("max_length", self.max_length)),
        )
        self._fits = most

    def _in_flight(self, batches: Iterable[Begin], *, ahead: bool = True) -> Iterator[Any]:
        """What each of some batches left, in order; a device has the next one while one is read.

        Args:
            batches: each begins one, and gives what waits for it.
            ahead: whether a batch may begin before the one in front of it is read.
        """
        most = AHEAD.get(self.device.type, 0) if ahead else 0
        known = len(self._journal.records) - self._replayed
        begun: deque[Wait] = deque()
        for number, begin in enumerate(batches):
            early = most and number >= known
            begun.append(begin() if early else partial(_at_once, begin))
            if len(begun) > most:
                yield self._batch(begun.popleft())
        if most and self._early is None:
            self._early = self._begin_following()
        while begun:
            yield self._batch(begun.popleft())

    def forget_early(self) -> None:
        """What was begun early was begun for another node, or for nothing."""
        self._early = None

    def _begin_following(self) -> Early | None:
        """Begin the first batch of the task that follows, where that may be done."""
        return None

    def _begun(self, begin: Callable[[_Batch], Wait], batch: _Batch) -> Wait:
        """Begin a batch, unless it was begun before its task was."""
        early = self._early
        if early is None or early.batch is not batch:
            return begin(batch)
        self._early = None
        return early.wait

    def _batch(self, compute: Callable[[], Any]) -> Any:
        """The next batch's record: from the journal if an earlier run got so far."""
        now = self._replayed == len(self._journal.records)
        if now:
            self._journal.append(compute())
        record = self._journal.records[self._replayed]
        self._replayed += 1
        self.ran(self._replayed, now)
        return record
