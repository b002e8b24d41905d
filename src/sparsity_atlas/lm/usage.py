"""What each document of a task cost: tokens, zeros, and nats, summed over its requests."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_atlas.sparsify.step_sums import StepSums
from sparsity_atlas.terms import ACCOUNTS, DENOISING, GENERATION, PROMPT, SCORING, UNIQUE

if TYPE_CHECKING:
    from sparsity_atlas.lm.forest import Batch
    from sparsity_atlas.lm.work import Arranged
    from sparsity_atlas.sparsify.attach import Counter


class Usage:
    """Sums by document.

    Attributes:
        documents: (task, document) of each row.
        tokens: for each of `ACCOUNTS` int64 [documents].
        zeros: for each of `ACCOUNTS` int64 [documents, slots].
        nats: negative log-likelihood of all that was predicted, float64 [documents].
        predicted: tokens predicted, int64 [documents].
        cut: tokens that the longest request lost at its beginning, int64 [documents].
        unfinished: texts that were generated up to their budget of tokens, int64 [documents].
        windows: that a whole document was scored in, 0 for any other, int64 [documents].
        by_expert: sums by expert, over all documents.
        by_step: sums by step of denoising, over all documents.
    """

    def __init__(self, work: Arranged, counter: Counter) -> None:
        slots = len(counter.slots)
        self.by_expert = ExpertUsage(work, counter)
        self.by_step = StepSums(counter.by_step.slots)
        self.documents = work.documents
        count = len(work.documents)
        self.tokens = {account: np.zeros(count, np.int64) for account in ACCOUNTS}
        self.zeros = {account: np.zeros((count, slots), np.int64) for account in ACCOUNTS}
        self.nats = np.zeros(count)
        self.predicted = np.zeros(count, np.int64)
        self.cut = np.array(work.cut, np.int64)
        self.unfinished = np.zeros(count, np.int64)
        self.windows = np.zeros(count, np.int64)
        owners = work.owners.get("loglikelihood_rolling", [])
        np.add.at(self.windows, [owners[request] for request in work.windows], 1)

    def add_scored(self, batch: Batch, record: dict[str, Any]) -> None:
        """Add a batch of scored requests."""
        self.by_expert.add_scored(record)
        rows = np.array(batch.documents)
        shape = len(rows), self.zeros[SCORING].shape[1]
        self.zeros[SCORING][rows] += unpacked(record["zeros"]).reshape(shape)
        self.zeros[UNIQUE][rows] += unpacked(record["unique"]).reshape(shape)
        owners = rows[batch.owners]
        np.add.at(self.tokens[SCORING], owners, batch.run * batch.counted)
        np.add.at(self.tokens[UNIQUE], owners, batch.run - batch.brought)
        np.subtract.at(self.nats, owners, record["scores"])
        np.add.at(self.predicted, owners, np.diff(batch.firsts, append=len(batch.row)))

    def add_generated(self, owners: list[int], lengths: list[int], record: dict[str, Any]) -> None:
        """Add a batch of generation.

        Args:
            owners: of its rows.
            lengths: tokens of its prompts, before they were cut.
            record: as `GeneratingLM.generate` gives it.
        """
        self.by_expert.add_generated(record)
        np.maximum.at(self.cut, owners, np.array(lengths) - record["prompt_tokens"])
        np.add.at(self.unfinished, owners, record["unfinished"])
        for phase in (PROMPT, GENERATION):
            np.add.at(self.tokens[phase], owners, record[f"{phase}_tokens"])
            np.add.at(self.zeros[phase], owners, np.array(record[f"{phase}_zeros"], np.int64))
        # A prompt that is sampled from several times is the same each time.
        self.tokens[UNIQUE][owners] = record["prompt_tokens"]
        self.zeros[UNIQUE][owners] = record["prompt_zeros"]


def packed(values: np.ndarray) -> str:
    """Integers as text for a batch's record: spelt out, they would take longer than all else in it.

    The bytes of one come first: of a dense baseline, which counts every site, they are most of a journal.
    """
    narrow = not values.size or abs(values).max() <= np.iinfo("<i4").max
    size = 4 if narrow else 8
    return f"{size}{base64.b64encode(values.astype(f'<i{size}').tobytes()).decode()}"


def unpacked(text: str) -> np.ndarray:
    """The integers of a text, int64 in one row; see `packed`."""
    return np.frombuffer(base64.b64decode(text[1:]), f"<i{text[0]}").astype(np.int64)


class ExpertUsage:
    """Sums by expert: rows of tokens and zeros as `ByExpert` has them.

    Attributes:
        sums: for each phase that the task has int64 [rows, 2, experts], as often as lm-eval runs a token,
            and with each token of a document once. Empty for models without experts.
    """

    def __init__(self, work: Arranged, counter: Counter) -> None:
        self._shape = counter.by_expert.rows, counter.by_expert.experts
        rows, experts = self._shape
        self.sums = {
            phase: np.zeros((rows, 2, experts), np.int64)
            for phase in work.phases
            if counter.by_expert.slots
        }

    def add_scored(self, record: dict[str, Any]) -> None:
        """Add a batch of scored requests."""
        if self.sums:
            self.sums[SCORING] += self._read(record)[:, :2]

    def add_generated(self, record: dict[str, Any]) -> None:
        """Add a batch of generation, in which nothing that is generated stands twice."""
        if self.sums:
            found = self._read(record)
            self.sums[PROMPT] += found[:, :2]
            self.sums[GENERATION] += found[:, 2:]

    def add_denoised(self, record: dict[str, Any]) -> None:
        """Add passes of denoising."""
        if self.sums:
            self.sums[DENOISING] += self._read(record)[:, :2]

    def _read(self, record: dict[str, Any]) -> np.ndarray:
        """[rows, 3, experts]: of the first pass both, and of those after it."""
        rows, experts = self._shape
        # It is read once, and outweighs the rest of what is kept of each batch until the task ends.
        content = zlib.decompress(base64.b64decode(record.pop("experts")))
        return np.frombuffer(content, "<i8").reshape(rows, 3, experts)


def expert_record(taken: list[np.ndarray]) -> dict[str, str]:
    """What a batch's record has of its sums by expert, as `ByExpert.take` gives them.

    Compressed, since as numbers in JSON they would outweigh all else that a journal holds.
    """
    if not taken:
        return {}
    (sums,) = taken
    return {"experts": base64.b64encode(zlib.compress(sums.astype("<i8").tobytes(), 1)).decode()}
