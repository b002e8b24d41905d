"""One token more of every row, without the host: the pass, the likeliest token, and what was counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sparsity_atlas.lm.continuous import recording
from sparsity_atlas.lm.continuous.ring import Ring
from sparsity_atlas.sparsify.transfer import fetched

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.lm.continuous.called import Called
    from sparsity_atlas.lm.forward import Masks
    from sparsity_atlas.sparsify.attach import Counter


# Of a vocabulary, whose maxima are found side by side, at most.
_PARTS = 512


class Log(NamedTuple):
    """What some steps in a row left.

    Attributes:
        tokens: that came out, int64 [steps, rows].
        zeros: counted in the pass, int64 [steps, slots, rows].
        finite: of each slot whether what was counted is free of NaN and infinities, bool [steps, slots].
        whole: whether the logits are, bool [steps, rows].
    """

    tokens: Any
    zeros: Any
    finite: Any
    whole: Any


class Step:
    """What runs again and again, on numbers that lie in the same place each time.

    Attributes:
        ring: keys and values.
        tokens: that each row is fed next, int64 [rows].
        lengths: tokens of each row, with the one that it is fed next, int64 [rows].
        logits: of the last step, [rows, vocabulary].
    """

    def __init__(
        self,
        called: Called,
        counter: Counter | None,
        rows: int,
        size: int,
        masks: Masks,
        steps: int,
    ) -> None:
        """Make room.

        Args:
            called: the model.
            counter: of what is attached to it; None: nothing is.
            rows: that run at once.
            size: tokens that a row can hold.
            masks: how the model is told who sees whom.
            steps: after which the log is read at the latest.
        """
        device = called.device
        self._called, self._counter, self._masks = called, counter, masks
        self.ring = Ring(rows, size, device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = torch.ones(rows, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        shape, slots = (steps, rows), len(counter.slots) if counter else 0
        self._log = Log(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros((steps, slots, rows), dtype=torch.int64, device=device),
            torch.ones((steps, slots), dtype=torch.bool, device=device),
            torch.ones(shape, dtype=torch.bool, device=device),
        )
        self._fed = torch.ones((rows, 1), dtype=torch.bool, device=device)
        self.logits = torch.empty(0)
        self._replay: Callable[[], None] | None = None

    def run(self) -> None:
        """One step."""
        if self._replay is None:
            self._run()
        else:
            self._replay()

    def read(self, steps: int) -> Callable[[], Log]:
        """Begin to read what the last steps left, and begin the log anew.

        Args:
            steps: how many there were since it was read last.

        Returns:
            What waits for them, and gives it.
        """
        wait = fetched([one[:steps].clone() for one in self._log])
        self._at.zero_()
        return lambda: Log(*wait())

    def forget(self) -> None:
        """Let go of what was recorded; what runs next is the model as it is then."""
        self._replay = None

    def record(self) -> None:
        """Have a GPU keep the step as it is, to be run again in one piece.

        Raises:
            RuntimeError: something in it waits for the host.
        """
        before = [one.clone() for one in self._state()]
        stream = torch.cuda.Stream(self._called.device)
        stream.wait_stream(torch.cuda.current_stream(self._called.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                # Makes whatever is made once: room, compiled kernels, plans.
                self._reset(before)
                self._run()
        torch.cuda.current_stream(self._called.device).wait_stream(stream)
        seen = self.logits.clone(), self._log.zeros[0].clone()
        self._reset(before)
        self._replay, _ = recording.recorded(self._run)
        self.run()
        again = self.logits, self._log.zeros[0]
        self._reset(before)
        recording.check(seen, again)

    def _state(self) -> list[Tensor]:
        return [self.ring.clock, self.tokens, self.lengths, self._at]

    def _reset(self, values: list[Tensor]) -> None:
        for one, value in zip(self._state(), values, strict=True):
            one.copy_(value)

    def _run(self) -> None:
        ring, counter = self.ring, self._counter
        if counter:
            counter.expect(self._fed, "generation")
        self.logits = self._called.next_logits(
            self.tokens[:, None],
            (self.lengths - 1)[:, None],
            self._called.masks(ring.age(), self.lengths, self._masks),
            ring,
        )
        tokens, entire = likeliest(self.logits)
        if counter:
            zeros, _, finite = counter.take_unseen()
        else:
            zeros, finite = self._fed.new_zeros(0, *self._fed.shape), self._fed.new_ones(0)
        made = Log(tokens, zeros.squeeze(-1).long(), finite, entire)
        for kept, value in zip(self._log, made, strict=True):
            kept.index_copy_(0, self._at, value[None])
        self._at.add_(1)
        ring.clock.add_(1).remainder_(ring.size)
        self.tokens.copy_(tokens)
        # Rows that nobody reads go on as well; they must not leave the room that there is.
        self.lengths.add_(1).clamp_(max=ring.size)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first largest of each row, and `whole`, of logits [rows, vocabulary].

    A GPU has one block for a row's maximum; of parts of a row it has many.
    """
    rows, size = logits.shape
    parts = next(one for one in range(min(_PARTS, size), 0, -1) if size % one == 0)
    largest, place = logits.reshape(rows, parts, -1).max(-1)
    part = largest.argmax(-1, keepdim=True)
    tokens = (part * (size // parts) + place.gather(-1, part)).squeeze(-1)
    # The largest of a part is NaN where one of it is.
    return tokens, whole(largest)


def whole(logits: Tensor) -> Tensor:
    """Of each row of logits whether NaN and infinity are absent: bool [rows].

    Minus infinity is how transformers forbids a token.
    """
    return (logits < torch.inf).all(-1)


def prompt_columns(clock: int, longest: int, size: int) -> np.ndarray:
    """Where the tokens of prompts go that end at the clock, int64 [longest]."""
    return (clock - longest + np.arange(longest)) % size
