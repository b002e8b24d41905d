"""Sums by step: what a journal holds of a batch, and batches of different lengths."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.sparsify.step_sums import (
    BINS,
    BLOCK_SUMS,
    BLOCKS,
    REGIONS,
    TOKEN_SUMS,
    StepSums,
    step_record,
)
from sparsity_atlas.terms import PlaceKey

SLOTS = [Slot(PlaceKey(layer, "ffn", "intermediate"), 10, 4) for layer in range(3)]


def taken(steps: int) -> list[Tensor]:
    """What a batch of so many steps leaves; any numbers."""
    draw = torch.Generator().manual_seed(steps)
    shapes = [
        (steps, len(REGIONS) + len(BLOCKS)),
        (steps, len(SLOTS), len(TOKEN_SUMS), len(REGIONS)),
        (steps, len(SLOTS), len(BLOCK_SUMS), len(BLOCKS)),
        (len(SLOTS), BINS, len(BLOCKS)),
    ]
    return [torch.randint(0, 1 << 50, shape, generator=draw) for shape in shapes]


def test_batches_of_different_lengths_add_up() -> None:
    sums = StepSums(SLOTS)
    for steps in (2, 4, 1):
        record = json.loads(
            json.dumps({"texts": [], **step_record([one.numpy() for one in taken(steps)])})
        )
        sums.add(record)
        assert record == {"texts": []}  # nothing of it is kept in memory
    each = [[one.numpy() for one in taken(steps)] for steps in (2, 4, 1)]
    for step in range(4):
        there = [one for one in each if len(one[0]) > step]
        assert np.array_equal(sums.tokens[step], sum(one[0][step, :4] for one in there))
        assert np.array_equal(sums.rows[step], sum(one[0][step, 4:] for one in there))
        assert np.array_equal(sums.of_tokens[step], sum(one[1][step] for one in there))
        assert np.array_equal(sums.of_blocks[step], sum(one[2][step] for one in there))
    assert np.array_equal(sums.over, sum(one[3] for one in each))


def test_a_batch_without_steps_leaves_nothing() -> None:
    assert step_record([]) == {}
    sums = StepSums(SLOTS)
    sums.add({})
    assert len(sums.tokens) == 0
