"""A masked-diffusion model that is asked nothing, to learn which passes an evaluation will make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_atlas.diffusion.denoise import Denoise
from sparsity_atlas.lm.masked.masked_lm import MaskedLM
from sparsity_atlas.lm.usage import packed
from sparsity_atlas.plan.dry_run import Batch, Dry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lm_eval.api.instance import Instance
    from torch import Tensor

    from sparsity_atlas.diffusion.denoise import Asked
    from sparsity_atlas.lm.masked.masked_work import RowBatch


class DryMaskedLM(Dry, MaskedLM):
    """Every bound is 0, every text empty, after as many steps as there may be."""

    @property
    def denoise(self) -> Denoise:
        """What is not asked."""
        return _nothing

    def _spared(self, rows: Sequence[Sequence[int]], predicted: list[int], steps: int = 1) -> Any:
        """Note passes over some rows, and give what they leave; see `Passes.record`."""
        passes = steps * (2 if self.diffusion.guidance else 1)
        self.batches += [Batch([list(row) for row in rows], predicted)] * passes
        return {"tokens": [passes * len(row) for row in rows], "zeros": packed(np.zeros(0))}

    def _score(self, kind: str, batch: RowBatch) -> Callable[[], dict[str, Any]]:
        rows, read = self._work.rows(kind, batch, self.padding_id), len(batch.number)
        firsts = np.flatnonzero(np.diff(batch.row, prepend=-1))
        masked = np.diff(rows.starts, append=len(rows.targets))[firsts]
        tokens = [own[valid].tolist() for own, valid in zip(rows.tokens, rows.valid, strict=True)]
        spared = self._spared(tokens, masked.tolist())
        return lambda: {"parts": [0.0] * read, "likeliest": [False] * read, **spared}

    def _said(self, numbers: list[int]) -> dict[str, Any]:
        own = [self._work.scored["loglikelihood"][one] for one in numbers]
        length = len(own[0].answer)
        rows = [(*one.prompt, *one.answer) for one in own]
        return {"said": [False] * len(own), **self._spared(rows, [length] * len(own), length)}

    def _generate(self, request: Instance, numbers: list[int]) -> dict[str, Any]:
        schedule = self._options(request).schedule
        asked = [self._work.asked[one] for one in numbers]
        prompts = [tokens[schedule.length - self.max_length :] for tokens in asked]
        rows = [[*prompt, *[self.mask_token] * schedule.length] for prompt in prompts]
        return {
            "texts": [""] * len(rows),
            "cut": [len(a) - len(p) for a, p in zip(asked, prompts, strict=True)],
            "unfinished": [False] * len(rows),
            **self._spared(rows, [schedule.block_length] * len(rows), schedule.steps),
        }


def _nothing(asked: Asked) -> Iterable[Tensor]:
    raise NotImplementedError("a dry run asks nothing")
