"""What a node's masks were in each denoising step: one Parquet file, beside the per-sample table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparsity_atlas.evaluation.headed_table import CountTable, read_counts
from sparsity_atlas.sparsify.step_sums import BLOCK_SUMS, BLOCKS, FREQUENCIES, REGIONS, TOKEN_SUMS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_atlas.sparsify.counted_vectors import Slot
    from sparsity_atlas.sparsify.step_sums import StepSums

NAME = "steps.parquet"
PROMPT, ANSWER = BLOCKS
SCHEMA = pa.schema(
    [
        ("task", pa.string()),  # key in the configuration
        ("step", pa.int64()),  # null: all steps together, of prompt and answer
        ("layer", pa.int64()),
        ("part", pa.string()),
        ("tensor", pa.string()),
        ("region", pa.string()),  # prompt, answer, and of the answer masked, new and filled
        ("tokens", pa.int64()),
        ("entries", pa.int64()),
        *((name, pa.int64()) for name in TOKEN_SUMS),  # null where there is no other step
        # From here on of prompt and answer alone.
        ("generations", pa.int64()),  # that have tokens there
        ("neurons", pa.int64()),  # of all of these
        *((name, pa.int64()) for name in BLOCK_SUMS),  # null where there is no other step
    ]
)


def columns(slots: Sequence[Slot]) -> list[list[Any]]:
    """What the header says of each counted tensor: layer, part, tensor, entries of a token, neurons."""
    return [[*slot.key, slot.width, slot.neurons] for slot in slots]


def step_rows(task: str, sums: StepSums) -> pa.Table:
    """A task's rows: each counted tensor, region and step, those without tokens too; then all steps.

    Args:
        task: its name.
        sums: of its batches.
    """
    steps = len(sums.tokens)
    found = [SCHEMA.empty_table()]
    for place, slot in enumerate(sums.slots if steps else ()):
        key = {"task": task, **slot.key._asdict()}
        tokens = dict(zip(REGIONS, sums.tokens.T, strict=True))
        of_tokens = dict(zip(REGIONS, sums.of_tokens[:, place].transpose(2, 1, 0), strict=True))
        of_answer = [name for name in REGIONS if name != PROMPT]
        tokens[ANSWER] = sum((tokens[name] for name in of_answer), np.zeros(steps, np.int64))
        of_tokens[ANSWER] = np.sum([of_tokens[name] for name in of_answer], 0)
        for region in (PROMPT, ANSWER, *of_answer):
            numbers = {
                **{"step": np.arange(steps), "tokens": tokens[region]},
                "entries": tokens[region] * slot.width,
                **dict(zip(TOKEN_SUMS, of_tokens[region], strict=True)),
            }
            if region in BLOCKS:
                block = BLOCKS.index(region)
                rows = sums.rows[:, block]
                numbers |= {"generations": rows, "neurons": rows * slot.neurons}
                numbers |= zip(BLOCK_SUMS, sums.of_blocks[:, place, :, block].T, strict=True)
            found.append(_table({**key, "region": region}, numbers))
        for block, region in enumerate(BLOCKS):
            often = sums.over[place, :, block]
            totals = {
                **{"tokens": tokens[region].sum(), "entries": tokens[region].sum() * slot.width},
                **{"kept": of_tokens[region][0].sum(), "used": often[1:].sum()},
                **{"generations": often.sum() // slot.neurons, "neurons": often.sum()},
                **dict(zip(FREQUENCIES, often, strict=True)),
            }
            numbers = {name: np.array([total]) for name, total in totals.items()}
            found.append(_table({**key, "region": region}, numbers))
    return pa.concat_tables(found).combine_chunks()


def _table(key: dict[str, Any], numbers: dict[str, np.ndarray]) -> pa.Table:
    count = len(numbers["tokens"])
    found = {}
    for name in SCHEMA.names:
        if name in key:
            found[name] = pa.array([key[name]] * count, SCHEMA.field(name).type)
        elif name not in numbers:
            found[name] = pa.nulls(count, pa.int64())
        else:
            # The first step has none before it.
            compared = name.startswith(("previous_", "first_"))
            none = (numbers["step"] == 0) if compared else np.zeros(count, bool)
            found[name] = pa.array(numbers[name], pa.int64(), mask=none)
    return pa.table(found, SCHEMA)


def read_table(path: Path) -> CountTable:
    """Read a table.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """
    return read_counts(path, SCHEMA, "entries of a token, neurons")
