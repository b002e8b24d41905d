"""What each document of a task cost: tokens, zeros, and nats, summed over its requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sparsity_atlas.lm.forest import Batch
    from sparsity_atlas.lm.work import Work

# Tokens of requests, as often as lm-eval runs them; the same, each once; tokens generated and fed back.
PHASES = ("prefill", "unique", "generation")


class Usage:
    """Sums by document.

    Attributes:
        documents: (task, document) of each row.
        tokens: for each phase int64 [documents].
        zeros: for each phase int64 [documents, slots].
        nats: negative log-likelihood of all that was predicted, float64 [documents].
        predicted: tokens predicted, int64 [documents].
        cut: tokens that the longest request lost at its beginning, int64 [documents].
        windows: that a whole document was scored in, 0 for any other, int64 [documents].
    """

    def __init__(self, work: Work, slots: int) -> None:
        self.documents = work.documents
        count = len(work.documents)
        self.tokens = {phase: np.zeros(count, np.int64) for phase in PHASES}
        self.zeros = {phase: np.zeros((count, slots), np.int64) for phase in PHASES}
        self.nats = np.zeros(count)
        self.predicted = np.zeros(count, np.int64)
        self.cut = np.array(work.cut, np.int64)
        self.windows = np.zeros(count, np.int64)
        owners = work.owners.get("loglikelihood_rolling", [])
        np.add.at(self.windows, [owners[request] for request in work.windows], 1)

    def add_scored(self, batch: Batch, record: dict[str, Any]) -> None:
        """Add a batch of scored requests."""
        rows = np.array(batch.documents)
        self.zeros["prefill"][rows] += np.array(record["zeros"], np.int64)
        self.zeros["unique"][rows] += np.array(record["unique"], np.int64)
        owners = rows[batch.owners]
        np.add.at(self.tokens["prefill"], owners, batch.run * batch.counted)
        np.add.at(self.tokens["unique"], owners, batch.run - batch.brought)
        np.subtract.at(self.nats, owners, record["scores"])
        np.add.at(self.predicted, owners, np.diff(batch.firsts, append=len(batch.row)))

    def add_generated(self, owners: list[int], lengths: list[int], record: dict[str, Any]) -> None:
        """Add a batch of generation.

        Args:
            owners: of its rows.
            lengths: tokens of its prompts, before they were cut.
            record: as `GeneratingLM.generate` gives it.
        """
        np.maximum.at(self.cut, owners, np.array(lengths) - record["prefill_tokens"])
        for phase in ("prefill", "generation"):
            np.add.at(self.tokens[phase], owners, record[f"{phase}_tokens"])
            np.add.at(self.zeros[phase], owners, np.array(record[f"{phase}_zeros"], np.int64))
        # A prompt that is sampled from several times is the same each time.
        self.tokens["unique"][owners] = record["prefill_tokens"]
        self.zeros["unique"][owners] = record["prefill_zeros"]
