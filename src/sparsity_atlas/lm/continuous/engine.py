"""Prompts in, texts out: which row runs which prompt, and what each of them cost.

A GPU is given some steps at a time. While it runs them, the host reads what the ones before them left, ends
the rows that have met their end, and gives their places to prompts that wait. So a row runs on behind its
end, for less than two such portions; what comes of these steps counts nowhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.lm.continuous.prompt_passes import PromptPasses
from sparsity_atlas.lm.continuous.recorded_step import Step
from sparsity_atlas.lm.generation import Text

if TYPE_CHECKING:
    from sparsity_atlas.lm.continuous.called import Called
    from sparsity_atlas.lm.continuous.ends import Ends
    from sparsity_atlas.lm.continuous.recorded_step import Log
    from sparsity_atlas.lm.forward import Masks
    from sparsity_atlas.sparsify.attach import Counter

# Steps that a GPU is given at a time, and such portions that it has before the first of them is read.
STEPS, AHEAD = 4, 1
# One of so many rows is a prompt's in a pass beside rows that go on; fewer wait for others.
SHARE = 8


class Engine:
    """Generates by greedy decoding, without any processor of logits."""

    def __init__(
        self,
        called: Called,
        counter: Counter,
        ends: Ends,
        *,
        rows: int,
        size: int,
        budget: int,
        padding: int,
        masks: Masks,
    ) -> None:
        """Make ready.

        Args:
            called: the model, proved for rows of `size` tokens.
            counter: of what is attached to it.
            ends: where a text ends.
            rows: that run at once.
            size: tokens of the longest prompt and its text.
            budget: tokens of a text.
            padding: what stands where a row has no token.
            masks: how the model is told who sees whom.

        Raises:
            RuntimeError: the step cannot be recorded.
        """
        self._called, self._counter, self._ends = called, counter, ends
        self._budget = budget
        self._rows: list[Text | None] = [None] * rows
        self._step = Step(called, counter, rows, size, masks, STEPS)
        self._together = max(rows // SHARE, 1)
        self._prompts = PromptPasses(
            called, counter, self._step, together=self._together, padding=padding
        )
        if called.device.type == "cuda":
            self._step.record()

    def run(self, prompts: list[list[int]]) -> Iterator[Text]:
        """Generate.

        Args:
            prompts: tokens of each.

        Yields:
            What became of each, as they end.

        Raises:
            NumericalFailure: NaN or an infinity came up.
        """
        waiting = deque(Text(number, prompt) for number, prompt in enumerate(prompts))
        begun: deque[Callable[[], Iterator[Text]]] = deque()
        while waiting or begun or any(self._rows):
            while self._worth_it(waiting):
                begun.append(self._begin(waiting))
            if steps := self._needed():
                begun.append(self._go_on(steps))
            while begun and (len(begun) > AHEAD or not self._needed()):
                yield from begun.popleft()()

    def _free(self) -> list[int]:
        return [row for row, text in enumerate(self._rows) if text is None]

    def _worth_it(self, waiting: deque[Text]) -> bool:
        free = len(self._free())
        enough = min(self._together, len(waiting))
        return bool(waiting) and free > 0 and (free >= enough or free == len(self._rows))

    def _needed(self) -> int:
        """Steps that any row may need, so many at most as are begun at a time."""
        left = [self._budget - 1 - text.given for text in self._rows if text is not None]
        return min(STEPS, max([0, *left]))

    def _begin(self, waiting: deque[Text]) -> Callable[[], Iterator[Text]]:
        """Run prompts in rows that are free: in all of them where none runs, else so many as fill a pass."""
        rows = self._free()
        if len(rows) < len(self._rows):
            rows = rows[: self._together]
        rows = rows[: len(waiting)]
        texts = [waiting.popleft() for _ in rows]
        for row, text in zip(rows, texts, strict=True):
            self._rows[row] = text
        wait = self._prompts.begin(rows, [text.prompt for text in texts])

        def read() -> Iterator[Text]:
            first = wait()
            self._counter.check(first.finite.tolist())
            _check(first.whole)
            for text, token, own in zip(texts, first.tokens.tolist(), first.zeros, strict=True):
                text.prompt_zeros, text.zeros = own, np.zeros_like(own)
                yield from self._add(text, token)

        return read

    def _go_on(self, steps: int) -> Callable[[], Iterator[Text]]:
        """Run some steps of all rows."""
        texts = list(self._rows)
        for _ in range(steps):
            self._step.run()
        for text in texts:
            if text is not None:
                text.given += steps
        wait = self._step.read(steps)

        def read() -> Iterator[Text]:
            log = wait()
            finite = log.finite.all(1)
            for row, text in enumerate(texts):
                if text is not None and not text.done:
                    yield from self._advance(text, row, log, finite)

        return read

    def _advance(self, text: Text, row: int, log: Log, finite: np.ndarray) -> Iterator[Text]:
        """Add to a text what some steps made of its row; `finite` of each step is whether all counts are."""
        for step, token in enumerate(log.tokens[:, row].tolist()):
            if not finite[step]:
                self._counter.check(log.finite[step].tolist())
            _check(log.whole[step, row])
            text.zeros = text.zeros + log.zeros[step, :, row]
            yield from self._add(text, token)
            if text.done:
                return

    def _add(self, text: Text, token: int) -> Iterator[Text]:
        text.tokens.append(token)
        text.ended = self._ends.met(text.tokens)
        if text.ended or len(text.tokens) == self._budget:
            text.done = True
            self._rows[self._rows.index(text)] = None
            yield text


def _check(whole: Any) -> None:
    if not np.all(whole):
        raise NumericalFailure("NaN or infinity in the logits")
