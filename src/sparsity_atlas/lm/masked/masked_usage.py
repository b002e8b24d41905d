"""What each document of a task cost a masked-diffusion model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_atlas.lm.usage import Usage, unpacked
from sparsity_atlas.terms import DENOISING, SCORING, UNIQUE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_atlas.diffusion.rows import Request
    from sparsity_atlas.terms import Phase


class MaskedUsage(Usage):
    """Sums by document: of rows that are scored, and of passes of denoising.

    A row counts once for the document that it belongs to, whatever is read of it. A document's rows, and its
    steps, differ in their masks: each token of each is one that it has once, so that `unique` is all.
    """

    def add_rows(self, owners: Sequence[int] | np.ndarray, record: dict[str, Any]) -> None:
        """Add a batch of rows that were scored, each of them one of its owner's."""
        self.by_expert.add_scored(record)
        self._add(SCORING, owners, record)

    def add_denoised(self, owners: Sequence[int], record: dict[str, Any]) -> None:
        """Add a batch of rows that were filled in, in all their steps."""
        self.by_expert.add_denoised(record)
        self.by_step.add(record)
        self._add(DENOISING, owners, record)

    def _add(
        self, phase: Phase, owners: Sequence[int] | np.ndarray, record: dict[str, Any]
    ) -> None:
        zeros = unpacked(record["zeros"]).reshape(len(owners), self.zeros[phase].shape[1])
        for account in (phase, UNIQUE):
            np.add.at(self.tokens[account], owners, record["tokens"])
            np.add.at(self.zeros[account], owners, zeros)

    def add_bounds(
        self, owners: Sequence[int], requests: Sequence[Request], bounds: Sequence[float]
    ) -> None:
        """Add what was found of requests, in nats."""
        np.subtract.at(self.nats, owners, bounds)
        np.add.at(self.predicted, owners, [len(one.answer) for one in requests])

    def add_ends(
        self, owners: Sequence[int], lost: Sequence[int], unfinished: Sequence[bool]
    ) -> None:
        """Note how many tokens each prompt lost at its beginning, and which texts did not come to an end."""
        np.maximum.at(self.cut, owners, lost)
        np.add.at(self.unfinished, owners, unfinished)
