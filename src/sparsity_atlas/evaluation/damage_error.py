"""How well the samples know a level's damage: its standard error, by which a search places its levels."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.tasks.score import sample_values
from sparsity_atlas.terms import IN_NATS, Kind

# Of a task: of each sample its unit (what was drawn independently), its value and its weight.
Values = list[tuple[Any, float, float]]


def read_values(folder: Path, metrics: dict[str, tuple[Kind, str | None]]) -> dict[str, Values]:
    """Each sample's nats and predicted tokens, or its metric and 1.

    Args:
        folder: of a node on whose tasks all is well.
        metrics: of the tasks that are asked for.
    """
    _, table = read_table(folder / "samples.parquet")
    found = {}
    for task, (kind, key) in metrics.items():
        rows = table.filter(pc.equal(table["task"], task))
        units = [
            (leaf, number) if cluster is None else cluster
            for leaf, number, cluster in zip(
                *(rows[name].to_pylist() for name in ("leaf", "doc_id", "cluster")), strict=True
            )
        ]
        if kind in IN_NATS:
            values, weights = rows["nats"].to_pylist(), rows["predicted"].to_pylist()
        else:
            values = sample_values(task, key, rows["metrics"].to_pylist())
            weights = [1] * len(values)
        found[task] = list(zip(units, values, weights, strict=True))
    return found


def score_error(dense: Values, own: Values) -> float:
    """Standard error of the difference of two scores (sum of values over sum of weights), paired by sample.

    The usual linearised variance of a ratio, over units; infinite if there is one alone.
    """
    differences = [a[1] - b[1] for a, b in zip(own, dense, strict=True)]
    total = sum(weight for *_, weight in own)
    mean = sum(differences) / total
    units: dict[Any, float] = defaultdict(float)
    for (unit, _, weight), difference in zip(own, differences, strict=True):
        units[unit] += difference - mean * weight
    if len(units) < 2:
        return math.inf
    spread = sum(one**2 for one in units.values()) * len(units) / (len(units) - 1)
    return math.sqrt(spread) / total
