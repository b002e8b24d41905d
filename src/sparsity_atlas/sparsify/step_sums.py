"""Sums by denoising step over batches, and how a journal holds those of one."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_atlas.sparsify.counted_vectors import Slot

# Where a token stands: in the prompt, or in the answer, where it is still masked at a step, was filled in by
# the step before, or has been there for longer.
REGIONS = ("prompt", "masked", "new", "filled")
BLOCKS = ("prompt", "answer")
# Sums over a region's tokens: entries kept; against the step before those that it kept of the same tokens,
# those that both kept, and the tokens' Jaccard indices in units of 1 / `UNIT`; against step 0 likewise.
TOKEN_SUMS = (
    "kept",
    *("previous_kept", "previous_both", "previous_jaccard"),
    *("first_kept", "first_both", "first_jaccard"),
)
# A Jaccard index of 1, so that sums of them are exact.
UNIT = 1 << 32
# Neurons by the share of a block's tokens that keep them: none, (0, 10 %], ..., (90 %, 100 %), all.
BINS = 12
FREQUENCIES = tuple(f"frequency_{place}" for place in range(BINS))
# Sums over rows: neurons that any token of the block keeps; of the step before and of step 0 the same, and
# those that are among them at both steps; then neurons by frequency.
BLOCK_SUMS = (
    *("used", "previous_used", "previous_used_both", "first_used", "first_used_both"),
    *FREQUENCIES,
)
KEY = "steps"
_MEMBERS = len(REGIONS) + len(BLOCKS)
_OF_TOKENS, _OF_BLOCKS = len(TOKEN_SUMS) * len(REGIONS), len(BLOCK_SUMS) * len(BLOCKS)
_OVER = BINS * len(BLOCKS)


def step_record(taken: Sequence[np.ndarray]) -> dict[str, str]:
    """What a batch's record has of its sums by step, as `ByStep.take` gives them.

    Compressed, since as numbers in JSON they would outweigh all else that a journal holds.
    """
    if not taken:
        return {}
    content = b"".join(one.astype("<i8").tobytes() for one in taken)
    return {KEY: base64.b64encode(zlib.compress(content, 1)).decode()}


class StepSums:
    """Sums over batches, each of as many steps as it took.

    Attributes:
        slots: that are counted; without any, nothing is.
        tokens: int64 [steps, REGIONS].
        rows: int64 [steps, BLOCKS], of the generations those that have tokens there.
        of_tokens: int64 [steps, slots, TOKEN_SUMS, REGIONS].
        of_blocks: int64 [steps, slots, BLOCK_SUMS, BLOCKS].
        over: int64 [slots, BINS, BLOCKS], neurons by the share of all steps' tokens that keep them.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        count = len(slots)
        self._members = np.zeros((0, _MEMBERS), np.int64)
        self.of_tokens = np.zeros((0, count, len(TOKEN_SUMS), len(REGIONS)), np.int64)
        self.of_blocks = np.zeros((0, count, len(BLOCK_SUMS), len(BLOCKS)), np.int64)
        self.over = np.zeros((count, BINS, len(BLOCKS)), np.int64)

    @property
    def tokens(self) -> np.ndarray:
        """See the attributes."""
        return self._members[:, : len(REGIONS)]

    @property
    def rows(self) -> np.ndarray:
        """See the attributes."""
        return self._members[:, len(REGIONS) :]

    def add(self, record: dict[str, Any]) -> None:
        """Add what a batch's record has, and take it out: it outweighs the rest of what is kept of it."""
        content = record.pop(KEY, None)
        if content is None:
            return
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(content)), "<i8")
        count = len(self.slots)
        each = _MEMBERS + count * (_OF_TOKENS + _OF_BLOCKS)
        steps = (len(numbers) - count * _OVER) // each
        ends = np.cumsum([steps * _MEMBERS, steps * count * _OF_TOKENS, steps * count * _OF_BLOCKS])
        members, tokens, blocks, over = np.split(numbers, ends)
        self._members = _sum(self._members, members)
        self.of_tokens = _sum(self.of_tokens, tokens)
        self.of_blocks = _sum(self.of_blocks, blocks)
        self.over = self.over + over.reshape(self.over.shape)


def _sum(sums: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Sums with those of a batch, of which either may have more steps."""
    added = more.reshape(-1, *sums.shape[1:])
    steps = max(len(sums), len(added))
    found = np.zeros((steps, *sums.shape[1:]), np.int64)
    found[: len(sums)] += sums
    found[: len(added)] += added
    return found
