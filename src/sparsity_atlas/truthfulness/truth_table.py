"""The table of what tells right answers from wrong ones, of one model and task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsity_atlas.files.parquet import read_parquet

LID, GEOMLE, SPARSITY, LOGPROB, MARGIN = "lid", "lid_geomle", "sparsity", "logprob", "margin"
SCHEMA = pa.schema(
    [
        ("predictor", pa.string()),
        ("tensor", pa.string()),  # of a dimension
        ("layer", pa.int64()),  # of a dimension; null: picked on the other half of the samples
        ("node", pa.string()),  # of a sparsity: criterion/site/level
        ("auroc", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("mean_right", pa.float64()),  # of the predictor itself
        ("mean_wrong", pa.float64()),
        ("reference", pa.string()),  # what `difference` is counted from
        ("difference", pa.float64()),
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("samples", pa.int64()),
        ("right", pa.int64()),
        ("reason", pa.string()),  # why there is no number; else empty
    ]
)
TRUTHFULNESS = ["model", "task", *SCHEMA.names]


def truth_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Rows of truthfulness.csv, from some results/{model}/truthfulness/{task}.parquet."""
    for path in paths:
        for row in read_parquet(path, SCHEMA).to_pylist():
            yield {"model": path.parts[-3], "task": path.stem, **row}
