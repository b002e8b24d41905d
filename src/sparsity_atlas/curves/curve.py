"""Stage `curve`: all that later stages need of one (model, criterion, site), read from its samples."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.criteria.level_arguments import add_levels, levels_of
from sparsity_atlas.curves.critical import critical
from sparsity_atlas.curves.equal_sparsity import (
    REPLICATES,
    Of,
    crossing_rows,
    equal_rows,
    write_equal,
)
from sparsity_atlas.curves.node_samples import NodeSamples, Profile
from sparsity_atlas.curves.phases import mean_profile, phase_profile, phase_rows
from sparsity_atlas.curves.points import CurvePoint, curve_points, estimate_all
from sparsity_atlas.curves.with_and_without import inserted_rows
from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.files.whole import digest, write_manifest
from sparsity_atlas.statistics.bootstrap import Estimates, TaskSamples
from sparsity_atlas.tasks.score import choose_metric, sample_values
from sparsity_atlas.terms import AVERAGE, IN_NATS, TENSORS, Kind, plain, tensors_at


def task_samples(
    task: str,
    metric: str | None,
    dense: NodeSamples,
    levels: list[NodeSamples],
    of: Of = "entries",
) -> TaskSamples | None:
    """One task's paired samples over the levels; None if the dense model failed on it.

    Args:
        task: its key in the configuration.
        metric: that the configuration names.
        dense: the baseline.
        levels: nodes of one curve.
        of: what sparsity is a share of; an entry counts once, or once for each parameter that meets it.

    Raises:
        AtlasError: the nodes do not hold the same samples.
    """
    if not dense.ok(task):
        return None
    result = dense.manifest["tasks"][task]
    kind, key = choose_metric(task, metric, result)
    base = dense.rows(task)
    identity = _identity(base)

    def counts(node: NodeSamples) -> np.ndarray | int:
        # Each by its own slots: where maps have masks of their own, a node has more of them than dense.
        return node.outputs(task) if of == "parameters" else 1

    values, zeros, entries = [], [], []
    for node in levels:
        rows = node.rows(task)
        if node.ok(task) and _identity(rows) != identity:
            raise AtlasError(
                f"{node.folder}: samples of '{task}' differ from the dense baseline's; delete both"
            )
        try:
            found = _values(task, rows, kind, key) if node.ok(task) else None
        except TaskFailure as failure:
            # The baseline has the metric of each document, and this level has not.
            node.fail(task, str(failure))
            found = None
        if found is None:
            values.append(np.full(len(base), np.nan))
            zeros.append(np.zeros(len(base), dtype=np.int64))
            entries.append(zeros[-1])
            continue
        values.append(found)
        zeros.append(node.zeros(rows, counts(node)))
        entries.append(node.entries(rows, counts(node)))
    clusters = base["cluster"].to_pylist()
    shape = (len(levels), len(base))  # a search may have chosen no level
    return TaskSamples(
        task=task,
        kind=kind,
        value=np.array(values, dtype=np.float64).reshape(shape),
        weight=base["predicted"].to_numpy() if kind in IN_NATS else np.ones(len(base)),
        dense=_values(task, base, kind, key),
        zeros=np.array(zeros, dtype=np.int64).reshape(shape),
        entries=np.array(entries, dtype=np.int64).reshape(shape),
        dense_zeros=dense.zeros(base, counts(dense)),
        dense_entries=dense.entries(base, counts(dense)),
        cluster=None if None in clusters else np.unique(clusters, return_inverse=True)[1],
        chance=result["chance"] if kind == "accuracy" else None,
    )


def _identity(rows: pa.Table) -> list[tuple[Any, ...]]:
    return list(
        zip(*(rows[name].to_pylist() for name in ("leaf", "doc_id", "doc_hash")), strict=True)
    )


def identity(rows: pa.Table) -> dict[str, Any]:
    """What tells whether a task's samples are those of another model: digests of documents and tokens.

    Documents are equal whatever template or tokenizer they were put in; of tokens there is the number that
    was predicted of each.
    """
    keys = _identity(rows)
    clusters = rows["cluster"].to_pylist()
    return {
        "items": len(rows),
        "documents": digest([keys, clusters]),
        "tokens": digest(rows["predicted"].to_pylist()),
    }


def _values(task: str, rows: pa.Table, kind: Kind, key: str | None) -> np.ndarray:
    if kind in IN_NATS:
        nats: np.ndarray = rows["nats"].to_numpy()
        return nats
    return np.array(sample_values(task, key, rows["metrics"].to_pylist()))


def layer_profile(node: NodeSamples, tasks: list[str]) -> Profile:
    """Induced sparsity of each layer, mean over tasks, for each tensor at the site."""
    results = [node.manifest["tasks"][task]["sparsity"] for task in tasks if node.ok(task)]
    return mean_profile([{name: one[name]["layers"] for name in one} for one in results])


def parameter_sparsity(node: NodeSamples, task: str, site: str) -> float | None:
    """Share of the products of weights and entries at the site that a zero makes; None if it failed.

    Every entry weighs as many weights as it meets, so that tensors of different readers add up to what
    a kernel could leave out.
    """
    if not node.ok(task):
        return None
    counted = node.manifest["tasks"][task]["sparsity"]
    named = {*tensors_at(site), *TENSORS[plain(site)]}
    tensors = [counted[tensor] for tensor in counted if tensor in named]
    products = sum(one["products"] for one in tensors)
    return sum(one["zero_products"] for one in tensors) / products if products else None


def point_rows(
    points: list[CurvePoint],
    nodes: dict[str, NodeSamples],
    site: str,
    beside: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Rows of curves.csv: the points, and the sparsity by parameters and texts that were cut beside each."""
    accuracies = {point.task for point in points if point.kind == "accuracy"} - {AVERAGE, *beside}
    rows = []
    for point in points:
        tasks = accuracies if point.task == AVERAGE else {point.task}
        shares = [parameter_sparsity(nodes[point.level], task, site) for task in sorted(tasks)]
        known = [share for share in shares if share is not None]
        mean = sum(known) / len(known) if len(known) == len(shares) else None
        node = nodes[point.level]
        cut = sum(node.cut(task)["unfinished"] for task in tasks if node.ok(task))
        rows.append({**asdict(point), "parameter_sparsity": mean, "unfinished_items": cut})
    return rows


def all_samples(
    dense: NodeSamples,
    nodes: dict[str, NodeSamples],
    settings: dict[str, Any],
    of: Of = "entries",
) -> list[TaskSamples]:
    """Paired samples of every task that the dense model did not fail on.

    Args:
        dense: the baseline.
        nodes: by level.
        settings: as `grid.curve_slice` gives it.
        of: what sparsity is a share of.
    """
    found = (
        task_samples(task, entry.get("metric"), dense, list(nodes.values()), of)
        for task, entry in settings["tasks"].items()
    )
    return [one for one in found if one is not None]


def equal_of(
    dense: NodeSamples,
    nodes: dict[str, NodeSamples],
    samples: list[TaskSamples],
    estimates: list[Estimates],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """The rows of equal_sparsity.parquet: over entries and, where that is another thing, parameters."""
    rows = equal_rows(estimates) + crossing_rows(estimates, settings["bars"])
    task = samples[0].task if samples else ""
    counted = [one for one in (dense, *nodes.values()) if samples and one.ok(task)]
    if any(len(set(one.outputs(task).tolist())) > 1 for one in counted):
        weighed = all_samples(dense, nodes, settings, "parameters")
        replicates = min(settings["replicates"], REPLICATES)
        bootstrap = replicates, settings["seed"]
        again = estimate_all(weighed, *bootstrap, beside=made_of(settings))
        rows += equal_rows(again, "parameters")
    return rows


def made_of(settings: dict[str, Any]) -> dict[str, str]:
    """Of tasks with a text before their prompts the task whose prompts these are."""
    return {task: one["before"] for task, one in settings["tasks"].items() if "before" in one}


def build(
    dense: NodeSamples,
    nodes: dict[str, NodeSamples],
    samples: list[TaskSamples],
    estimates: list[Estimates],
    settings: dict[str, Any],
    site: str,
) -> dict[str, Any]:
    """The content of curve.json.

    Args:
        dense: the baseline.
        nodes: by level.
        samples: as `all_samples` gives them.
        estimates: of these.
        settings: as `grid.curve_slice` gives it.
        site: of the curve.
    """
    tasks = list(settings["tasks"])
    levels = list(nodes)
    failures = [
        {"level": level, "task": task, "reason": node.manifest["tasks"][task]["reason"]}
        for level, node in {"dense": dense, **nodes}.items()
        for task in tasks
        if not node.ok(task)
    ]
    befores = made_of(settings)
    bootstrap = settings["replicates"], settings["seed"]
    inserted = list(inserted_rows(samples, befores, dense, levels, *bootstrap))
    return {
        "levels": levels,
        "weights": dense.weights(samples[0].task) if samples else None,
        "points": point_rows(
            curve_points(estimates, levels), {"dense": dense, **nodes}, site, befores
        ),
        "phase_points": [
            row
            for one in samples
            for row in phase_rows(one, dense, nodes, settings["replicates"], settings["seed"])
        ],
        "critical": [asdict(row) for row in critical(estimates, settings["bars"], levels)],
        "layers": {level: layer_profile(node, tasks) for level, node in nodes.items()},
        "phases": {level: phase_profile(node, tasks) for level, node in nodes.items()},
        "scores": {
            level: {task: node.manifest["tasks"][task].get("scores") for task in tasks}
            for level, node in {"dense": dense, **nodes}.items()
        },
        "samples": {one.task: identity(dense.rows(one.task)) for one in samples},
        **({"beside": befores, "inserted": inserted} if befores else {}),
        "cut": {task: dense.cut(task) for task in tasks if dense.ok(task)},
        "failures": failures,
    }


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas curve", description=__doc__)
    parser.add_argument("--dense", required=True, type=Path, help="eval.json of the dense baseline")
    add_levels(parser)
    parser.add_argument("--site", required=True)
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: metrics, bars, bootstrap"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="curve.json to write, above its nodes"
    )
    parser.add_argument(
        "--equal", required=True, type=Path, help="Parquet file with scores at equal sparsities"
    )
    arguments = parser.parse_args()

    folder = cli.folder_of(arguments.output)
    nodes = {level: NodeSamples(folder / level, arguments.site) for level in levels_of(arguments)}
    dense = NodeSamples(arguments.dense.parent, arguments.site)
    settings = arguments.settings
    samples = all_samples(dense, nodes, settings)
    bootstrap = settings["replicates"], settings["seed"]
    estimates = estimate_all(samples, *bootstrap, beside=made_of(settings))
    write_equal(arguments.equal, equal_of(dense, nodes, samples, estimates, settings))
    content = build(dense, nodes, samples, estimates, settings, arguments.site)
    write_manifest(arguments.output, content)
