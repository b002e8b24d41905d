"""How much worse a level makes a model, and how well its samples know that: a search places levels by it.

It is told in units of what the headline's bar allows: 1 is at the bar.

Where a task has a loss, the first of these is the headline, and its added loss counts; else the average
accuracy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.tasks.score import pooled_score, sample_values
from sparsity_atlas.terms import AVERAGE, IN_NATS, Kind

HEADLINE = 0.99
ALLOWED_LOSS = math.log(1.01)

# Of each task: the kind of its metric, and its key among the samples' metrics.
Metrics = dict[str, tuple[Kind, str | None]]
# Of each task, pooled over its samples.
Scores = dict[str, float]
# Of a task: of each sample its unit (what was drawn independently), its value and its weight.
Values = list[tuple[Any, float, float]]


def read_scores(folder: Path, metrics: Metrics) -> Scores | None:
    """Score of each task of a node; None if one of them failed, or its metric lacks in a document."""
    manifest = read_manifest(folder / "eval.json")
    if any(manifest["tasks"][task]["status"] != "ok" for task in metrics):
        return None
    _, table = read_table(folder / "samples.parquet")
    rows = table.select(["task", "metrics", "nats", "predicted"]).to_pylist()
    try:
        return {
            task: pooled_score(task, kind, key, [row for row in rows if row["task"] == task])
            for task, (kind, key) in metrics.items()
        }
    except TaskFailure:  # the curve's stage says why
        return None


def headline_tasks(metrics: Metrics) -> list[str]:
    """The tasks that the headline is read from: the first one with a loss, else all."""
    return [task for task, (kind, _) in metrics.items() if kind in IN_NATS][:1] or list(metrics)


def damage(metrics: Metrics, dense: Scores, scores: Scores | None) -> float:
    """Damage in units of what the headline bar allows; see `next_level.Point`.

    With a loss task, its added loss over ln 1.01; otherwise the lost share of the average accuracy
    over 1 %.
    """
    if scores is None:
        return math.inf
    first = headline_tasks(metrics)[0]
    if metrics[first][0] in IN_NATS:
        return (scores[first] - dense[first]) / ALLOWED_LOSS
    return _lost_accuracy(list(metrics), dense, scores)


def slightest(metrics: Metrics, dense: Scores, scores: Scores | None) -> float:
    """Damage to whichever suffered least: the headline, or beside a loss the average accuracy."""
    found = damage(metrics, dense, scores)
    accuracies = [task for task, (kind, _) in metrics.items() if kind == "accuracy"]
    if scores is None or not sum(dense[task] for task in accuracies):
        return found
    return min(found, _lost_accuracy(accuracies, dense, scores))


def read_values(folder: Path, metrics: Metrics) -> dict[str, Values]:
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


def damage_error(metrics: Metrics, dense: dict[str, Values], own: dict[str, Values]) -> float:
    """Standard error of `damage`, from what `read_values` gives; 0 where there is one unit alone.

    Args:
        metrics: of the headline's tasks.
        dense: of the dense model.
        own: of the level.
    """
    errors = [score_error(dense[task], own[task]) for task in metrics]
    found = math.hypot(*errors)
    if any(kind in IN_NATS for kind, _ in metrics.values()):
        found /= ALLOWED_LOSS
    else:
        before = sum(sum(value for _, value, _ in one) / len(one) for one in dense.values())
        found /= before * (1 - HEADLINE)
    return found if math.isfinite(found) else 0.0


def _lost_accuracy(tasks: list[str], dense: Scores, scores: Scores) -> float:
    """The lost share of the average accuracy, in units of what the headline bar allows."""
    lost = 1 - sum(scores[task] for task in tasks) / sum(dense[task] for task in tasks)
    return lost / (1 - HEADLINE)


def allowed_damage(kind: Kind, bar: float) -> float:
    """What a bar allows, in units of what the headline's does; see `damage`."""
    return math.log1p(1 - bar) / ALLOWED_LOSS if kind in IN_NATS else (1 - bar) / (1 - HEADLINE)


def in_words(metrics: Metrics, dense: Scores, scores: Scores | None) -> str:
    """The headline's score in words, beside the dense model's."""
    if scores is None:
        return "failed"
    tasks = headline_tasks(metrics)
    if metrics[tasks[0]][0] in IN_NATS:
        return f"{tasks[0]} {scores[tasks[0]]:.4f} nats (dense {dense[tasks[0]]:.4f})"
    found, base = (100 * sum(one[task] for task in tasks) / len(tasks) for one in (scores, dense))
    return f"{tasks[0] if len(tasks) == 1 else AVERAGE} {found:.1f} % (dense {base:.1f} %)"
