"""The table of what `gates` measures: light, since tables read it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from sparsity_atlas.evaluation.headed_table import CountTable, read_counts

NAME = "gates.parquet"
QUANTITIES = ("near_zero", "l1", "l2", "gini")
SCHEMA = pa.schema(
    [
        ("task", pa.string()),  # key in the configuration
        ("leaf", pa.string()),
        ("doc_id", pa.int64()),
        ("cluster", pa.string()),  # null: each document by itself
        ("part", pa.string()),
        ("layer", pa.int64()),
        ("tokens", pa.int64()),  # that both prompts end with
        ("inserted", pa.int64()),  # tokens that one has more than the other
        *((f"{name}_{when}", pa.float64()) for name in QUANTITIES for when in ("before", "after")),
    ]
)


def read_table(path: Path) -> CountTable:
    """Read a table.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """
    return read_counts(path, SCHEMA, "none")
