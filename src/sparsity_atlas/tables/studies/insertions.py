"""What texts before prompts do: to the scores, and to the gates of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.evaluation.gates.gate_table import NAME, QUANTITIES, SCHEMA
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.statistics.bootstrap import interval, resampled_shares

INSERTED = ["model", "criterion", "site", "level", "task", "before", "kind", "items"]
INSERTED += ["score_before", "score_after", "difference", "low", "high"]
GATES = ["model", "task", "part", "layer", "documents", "inserted", "quantity"]
GATES += ["value_before", "value_after", "difference", "low", "high"]
# Of the bootstrap over documents.
REPLICATES, SEED = 2000, 0


def inserted_rows(key: dict[str, str], curve: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A curve's rows of inserted.csv."""
    for row in curve.get("inserted", ()):
        yield {**key, **row}


def gate_rows(models: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Rows of inserted_gates.csv: means over documents, and paired differences with their intervals.

    Args:
        models: manifests, with dense/gates.parquet beside some.
    """
    for manifest in models:
        path = manifest.parent / "dense" / NAME
        if not path.is_file():
            continue
        places: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for row in read_parquet(path, SCHEMA).to_pylist():
            places.setdefault((row["task"], row["part"], row["layer"]), []).append(row)
        for (task, part, layer), rows in places.items():
            clusters = [row["cluster"] for row in rows]
            drawn = None if None in clusters else np.unique(clusters, return_inverse=True)[1]
            about = {"model": manifest.parent.name, "task": task, "part": part, "layer": layer}
            about |= {"documents": len(rows)}
            about |= {"inserted": float(np.mean([row["inserted"] for row in rows]))}
            for quantity in QUANTITIES:
                before, after = (
                    np.array([row[f"{quantity}_{when}"] for row in rows])
                    for when in ("before", "after")
                )
                yield {**about, "quantity": quantity, **_paired(before, after, drawn)}


def _paired(
    before: np.ndarray, after: np.ndarray, clusters: np.ndarray | None
) -> dict[str, float | None]:
    one = np.ones((1, len(before)))
    drawn = resampled_shares("gates", (after - before)[None], one, clusters, REPLICATES, SEED)
    value, *replicates = drawn[:, 0]
    ends = interval(value, np.array(replicates)) if replicates else (None, None)
    means = {"value_before": float(before.mean()), "value_after": float(after.mean())}
    return {**means, "difference": float(value), "low": ends[0], "high": ends[1]}
