"""Forward passes over whole sequences, announced to the counter, with the zeros of each sequence added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsity_atlas.lm.usage import expert_record, packed
from sparsity_atlas.sparsify.step import Step
from sparsity_atlas.sparsify.step_sums import step_record
from sparsity_atlas.sparsify.transfer import fetched, sent
from sparsity_atlas.terms import DENOISING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from sparsity_atlas.diffusion.denoise import Asked, Denoise
    from sparsity_atlas.sparsify.attach import Counter
    from sparsity_atlas.terms import Phase


class Passes:
    """A model that is asked for one batch of sequences, once or in many steps; a `Denoise`.

    All tokens of a sequence count in each pass, those of its prompt and the masks among them; padding does
    not.
    """

    def __init__(
        self, denoise: Denoise, counter: Counter, phase: Phase, sequences: int, mask_token: int
    ) -> None:
        """Begin a batch.

        Args:
            denoise: the model.
            counter: that counts in it.
            phase: what the passes are for: `scoring` or `denoising`.
            sequences: of the batch.
            mask_token: id of the mask.
        """
        self._denoise = denoise
        self._counter = counter
        self._phase: Phase = phase
        self._mask_token = mask_token
        self._sequences = sequences
        # Of all passes so far: tokens [sequences], zeros [slots, sequences], and what `check` wants to see.
        self._sums: list[Tensor] = []
        self._experts: list[Tensor] = []

    def __call__(self, asked: Asked) -> Iterable[Tensor]:
        """Make a pass, without waiting for it; see `Denoise`."""
        counter, valid = self._counter, asked.valid
        # As often as it is run, and each once, which is the same.
        times = torch.stack([valid, valid]).long() if counter.by_expert.slots else None
        counter.expect(valid, self._phase, times, step=self._step(asked))
        pieces = self._denoise(asked)
        zeros, _, whole = counter.take_unseen()
        rows = np.array(asked.rows or range(len(valid)))
        self._add(rows, valid.sum(1), zeros.sum(2), whole)
        for sums in counter.by_expert.take():
            self._experts = [sums + one for one in self._experts] or [sums]
        return pieces

    def _add(self, rows: np.ndarray, tokens: Tensor, zeros: Tensor, whole: Tensor) -> None:
        if tokens.device.type == "mps":  # which adds up no 64-bit integers
            tokens, zeros, whole = tokens.cpu(), zeros.cpu(), whole.cpu()
        if not self._sums:
            count = len(zeros)
            self._sums = [
                tokens.new_zeros(self._sequences),
                zeros.new_zeros(count, self._sequences),
                torch.ones_like(whole),
            ]
        index = sent(rows, tokens.device)
        self._sums[0].index_add_(0, index, tokens)
        self._sums[1].index_add_(1, index, zeros)
        self._sums[2] &= whole

    def _step(self, asked: Asked) -> Step | None:
        if self._phase != DENOISING:
            return None
        masked = (asked.ids == self._mask_token) & ~asked.prompt
        return Step(asked.step, asked.rows, asked.prompt, masked, asked.guide)

    def record(self) -> Callable[[], dict[str, Any]]:
        """What was run, when the passes are made.

        Returns:
            What waits for them, and gives `tokens` of each sequence, its `zeros` [sequences, slots]
            (`packed`), and sums by expert and step. It raises `NumericalFailure` where zeros were counted
            among NaN or infinities.
        """
        read = fetched([*self._sums, *self._experts])
        by_step = self._counter.by_step.take()
        steps = fetched(by_step) if by_step else list

        def found() -> dict[str, Any]:
            tokens, zeros, whole, *experts = read()
            self._counter.check(whole.tolist())
            return {
                "tokens": tokens.tolist(),
                "zeros": packed(zeros.T),
                **expert_record(experts),
                **step_record(steps()),
            }

        return found
