"""What a node counted by expert: one Parquet file, beside the per-sample table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparsity_atlas.evaluation.headed_table import CountTable, read_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_atlas.lm.usage import Usage
    from sparsity_atlas.sparsify.attach import Counter
    from sparsity_atlas.sparsify.counted_vectors import Slot

NAME = "experts.parquet"
COUNTS = ("tokens", "entries", "zeros")
SCHEMA = pa.schema(
    [
        ("task", pa.string()),  # key in the configuration
        ("phase", pa.string()),  # scoring, prompt or generation
        ("layer", pa.int64()),
        ("part", pa.string()),
        ("tensor", pa.string()),
        ("expert", pa.int64()),
        *((name, pa.int64()) for name in COUNTS),  # of the tokens that were routed to it
        *((f"unique_{name}", pa.int64()) for name in COUNTS),  # each token of a document once
    ]
)


def columns(slots: Sequence[Slot]) -> list[list[Any]]:
    """What the header says of each counted tensor: layer, part, tensor, experts, how many a token meets."""
    routed = [(slot.key, slot.routing) for slot in slots if slot.routing is not None]
    return [[*key, routing.experts, routing.each] for key, routing in routed]


def expert_rows(task: str, usage: Usage, counter: Counter) -> pa.Table:
    """A task's rows: each phase that it has, each counted tensor, each expert, those without tokens too.

    Args:
        task: its name.
        usage: `AtlasLM.usage` after the run.
        counter: that counted.
    """
    found = []
    for phase, sums in usage.by_expert.sums.items():
        for zeros, slot in zip(sums, counter.by_expert.slots, strict=False):
            assert slot.routing is not None, "only such slots are counted by expert"
            count, width = slot.routing.experts, slot.routing.width
            tokens = sums[counter.by_expert.tokens_row(slot)]
            numbers = (tokens, tokens * width, zeros)
            found.append(
                {
                    **{"task": [task] * count, "phase": [phase] * count},
                    **{name: [value] * count for name, value in slot.key._asdict().items()},
                    "expert": np.arange(count),
                    **{
                        f"{prefix}{name}": array[account, :count]
                        for account, prefix in enumerate(("", "unique_"))
                        for name, array in zip(COUNTS, numbers, strict=True)
                    },
                }
            )
    tables = [pa.table({name: one[name] for name in SCHEMA.names}, SCHEMA) for one in found]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def read_table(path: Path) -> CountTable:
    """Read a table.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """
    return read_counts(path, SCHEMA, "experts, how many a token meets")
