"""Forward passes over whole sequences, announced to the counter, with the zeros of each sequence added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas.lm.usage import expert_record
from sparsity_atlas.sparsify.step import Step
from sparsity_atlas.sparsify.step_sums import step_record
from sparsity_atlas.terms import DENOISING

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        self._tokens = torch.zeros(sequences, dtype=torch.int64)
        self._zeros = torch.zeros(len(counter.slots), sequences, dtype=torch.int64)
        self._experts: list[Tensor] = []

    def __call__(self, asked: Asked) -> Iterable[Tensor]:
        """Make a pass; see `Denoise`.

        Raises:
            NumericalFailure: NaN or an infinity where zeros are counted.
        """
        counter, valid = self._counter, asked.valid
        # As often as it is run, and each once, which is the same.
        times = torch.stack([valid, valid]).long() if counter.by_expert.slots else None
        counter.expect(valid, self._phase, times, step=self._step(asked))
        pieces = self._denoise(asked)
        zeros, _ = counter.take()
        rows = torch.tensor(asked.rows or range(len(valid)))
        self._tokens.index_add_(0, rows, valid.sum(1).cpu())
        self._zeros.index_add_(1, rows, zeros.sum(2).cpu())
        for sums in counter.by_expert.take():
            self._experts = [sums + one for one in self._experts] or [sums]
        return pieces

    def _step(self, asked: Asked) -> Step | None:
        if self._phase != DENOISING:
            return None
        masked = (asked.ids == self._mask_token) & ~asked.prompt
        return Step(asked.step, asked.rows, asked.prompt, masked, asked.guide)

    def record(self) -> dict[str, Any]:
        """What was run: `tokens` of each sequence, its `zeros` [sequence][slot], sums by expert and step."""
        return {
            "tokens": self._tokens.tolist(),
            "zeros": self._zeros.T.tolist(),
            **expert_record([sums.cpu().numpy() for sums in self._experts]),
            **step_record(self._counter.by_step.take()),
        }
