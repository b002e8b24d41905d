"""metrics.csv and magnitudes.csv: what a model's activations look like, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.activations.layout import part_of
from sparsity_atlas.files.parquet import read_parquet

METRICS = ["model", "tensor", "layer", "tokens", "width", "effective_rank", "effective_rank_share"]
METRICS += ["gini", "hoyer", "near_zero", "exact_zero", "at_most_zero", "rms", "kurtosis"]
METRICS += ["quantile_10", "quantile_50", "quantile_90", "quantile_99", "lid", "lid_geomle"]
MAGNITUDES = ["model", "tensor", "low", "high", "share"]
# Further columns of the two where a model has parts that a tensor's name does not tell.
PART = ["part", "expert"]


def metric_rows(metrics: list[Path]) -> list[dict[str, Any]]:
    """Rows of metrics.csv and the histograms; `all_inputs` repeats other sites' tensors."""
    from sparsity_atlas.activations.metrics import SCHEMAS

    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in metrics:
        for row in read_parquet(path, *SCHEMAS).to_pylist():
            # Of a dense model the tensor's name tells the part.
            row = {"part": part_of(row["tensor"])[0], "expert": None, **row}
            key = (path.parts[-3], *(row[name] for name in ("tensor", "layer", "part", "expert")))
            rows.setdefault(key, {"model": path.parts[-3], **row})
    return list(rows.values())


def magnitude_rows(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of magnitudes.csv: the histograms of a model's layers, pooled; zeros are left out."""
    from sparsity_atlas.activations.metrics import BIN_EDGES

    pooled: dict[tuple[str, str, str], np.ndarray] = {}
    for row in rows:
        key = (row["model"], row["tensor"], row["part"])
        if row["histogram"] is not None:  # of an expert with few rows
            pooled[key] = pooled.get(key, 0) + np.array(row["histogram"])
    for (model, tensor, part), counts in pooled.items():
        for low, high, count in zip(BIN_EDGES[:-1], BIN_EDGES[1:], counts, strict=True):
            yield {
                **{"model": model, "tensor": tensor, "part": part},
                **{"low": float(low), "high": float(high)},
                "share": float(count / max(counts.sum(), 1)),
            }
