"""Prompts into rows that are free, in passes of few shapes, which a GPU keeps when they come again.

A pass over few prompts is launched in a longer time than a GPU takes for it, and whatever is compiled or
planned for a shape takes longer yet. So prompts are run so many together, filled up with copies of the last
one, in a length that fits shorter ones as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sparsity_atlas import cli
from sparsity_atlas.lm.continuous import recording
from sparsity_atlas.lm.continuous.recorded_step import likeliest
from sparsity_atlas.sparsify.transfer import fetched, sent

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from sparsity_atlas.lm.continuous.called import Called
    from sparsity_atlas.lm.continuous.recorded_step import Step
    from sparsity_atlas.sparsify.attach import Counter

# Tokens of a pass, padding included, beyond which a GPU takes longer for it than the host.
LARGEST = 4096
# A new length is a multiple of this; prompts of three quarters of a known one are filled up to it.
MULTIPLE = 16
FILLED = 3, 4
# What stands in a line of a table behind the tokens of a prompt: how many there are, and its row.
BESIDE = 2


class First(NamedTuple):
    """What a pass leaves of each prompt.

    Attributes:
        tokens: the likeliest behind it, int64 [n].
        zeros: counted in it, int64 [n, slots].
        finite: of each slot whether what was counted is free of NaN and infinities, bool [slots].
        whole: whether its logits are, bool [n].
    """

    tokens: Any
    zeros: Any
    finite: Any
    whole: Any


class PromptPasses:
    """Passes over prompts, each of which begins a row of a step."""

    def __init__(
        self, called: Called, counter: Counter, step: Step, *, together: int, padding: int
    ) -> None:
        """Begin with no shape.

        Args:
            called: the model.
            counter: of what is attached to it.
            step: whose rows they become.
            together: prompts of a pass are a multiple of this, unless they are all rows.
            padding: what stands where a row has no token.
        """
        self._called, self._counter, self._step = called, counter, step
        self._together, self._padding = together, padding
        self._lengths: list[int] = []
        self._times: dict[torch.Size, int] = {}
        self._kept: dict[torch.Size, Callable[[Tensor], tuple[Tensor, ...]]] = {}
        self._keeps = called.device.type == "cuda"
        self._pool: Any = None

    def begin(self, rows: list[int], prompts: list[list[int]]) -> Callable[[], First]:
        """Run prompts.

        Args:
            rows: which ones they become; what these held is gone.
            prompts: tokens of each.

        Returns:
            What waits for the pass, and gives what it left.
        """
        count = len(rows)
        lines = count
        if count < self._step.ring.rows:
            lines = -(-count // self._together) * self._together
        longest = self._length(max(map(len, prompts)), lines)
        # One array, one copy to the device.
        table = np.full((lines, longest + BESIDE), self._padding, np.int64)
        for line, row, prompt in zip(table, rows, prompts, strict=False):
            line[longest - len(prompt) : longest] = prompt
            line[longest:] = len(prompt), row
        table[count:] = table[count - 1]
        *made, _ = self._run(sent(table, self._called.device))
        wait = fetched(made)

        def read() -> First:
            tokens, zeros, finite, whole = wait()
            return First(tokens[:count], zeros[:count], finite, whole[:count])

        return read

    def _length(self, longest: int, lines: int) -> int:
        """In how many columns prompts are run. One at least is padding, so that every pass has a mask."""
        size = self._step.ring.size
        least = min(longest + 1, size)
        if lines * least > LARGEST:
            return least
        part, whole = FILLED
        for length in sorted(self._lengths):
            if length * part <= least * whole and least <= length:
                return length
        length = min(-(-least // MULTIPLE) * MULTIPLE, size)
        self._lengths.append(length)
        return length

    def _run(self, table: Tensor) -> tuple[Tensor, ...]:
        shape = table.shape
        if shape in self._kept:
            return self._kept[shape](table)
        made = self._pass(table)
        self._times[shape] = self._times.get(shape, 0) + 1
        if self._keeps and self._times[shape] == 2 and _tokens(shape) <= LARGEST:
            self._keep(table, made)
        return made

    def _keep(self, table: Tensor, made: tuple[Tensor, ...]) -> None:
        """Have a GPU keep the pass over a table's shape; `made` is what it left."""
        table = table.clone()
        self._pool = self._pool or recording.pool()
        try:
            again, kept = recording.recorded(lambda: self._pass(table), self._pool)
            again()
            recording.check(made, kept)
        except RuntimeError as error:  # also where there is no memory to keep it
            reason = (str(error).splitlines() or [""])[0]
            cli.logger.info("passes over prompts are launched anew each time: %s", reason)
            self._keeps = False
            return

        def run(other: Tensor) -> tuple[Tensor, ...]:
            table.copy_(other)
            again()
            return kept

        self._kept[table.shape] = run

    def _pass(self, table: Tensor) -> tuple[Tensor, ...]:
        """The fields of `First`, and the logits, of a table [n, longest + BESIDE]."""
        step, counter, ring = self._step, self._counter, self._step.ring
        longest = table.shape[1] - BESIDE
        ids, lengths, rows = table[:, :longest], table[:, longest], table[:, longest + 1]
        ago = torch.arange(longest, 0, -1, device=table.device)
        valid = ago <= lengths[:, None]
        counter.expect(valid, "prompt")
        with ring.prompts(rows, (ring.clock - ago) % ring.size, valid):
            logits = self._called.next_logits(
                ids, (lengths[:, None] - ago).clamp(min=0), valid, ring
            )
        zeros, _, finite = counter.take_unseen()
        tokens, entire = likeliest(logits)
        step.tokens[rows] = tokens
        step.lengths[rows] = lengths + 1
        # Read again: of copies of a prompt one may have been the last to write.
        return step.tokens[rows], zeros.sum(2).T.contiguous(), finite, entire, logits


def _tokens(shape: torch.Size) -> int:
    """Of a pass over a table of a shape, padding included."""
    return shape[0] * (shape[1] - BESIDE)
