"""Induced sparsity by phase: of given text that is scored, of prompts, of what is generated or denoised.

A task of one phase is told by its curve as it is. Of a task with several each has a sparsity of its own; the
score belongs to all of them together.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from sparsity_atlas.curves.node_samples import NodeSamples, Profile, phases_of
from sparsity_atlas.curves.points import CurvePoint
from sparsity_atlas.statistics.bootstrap import TaskSamples, interval, resampled_shares
from sparsity_atlas.terms import PHASES


def phase_rows(
    samples: TaskSamples,
    dense: NodeSamples,
    nodes: dict[str, NodeSamples],
    replicates: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A task's rows of curves.csv for each of its phases; none where it has only one.

    Args:
        samples: of the task.
        dense: the baseline.
        nodes: by level, as `samples` has them.
        replicates: of the bootstrap, whose draws are those of the task's curve.
        seed: of the bootstrap.
    """
    task = samples.task
    every = {"dense": dense, **nodes}
    tables = {level: node.rows(task) for level, node in every.items()}
    there = {phase for rows in tables.values() for phase in phases_of(rows)}
    phases = [phase for phase in PHASES if phase in there]
    if len(phases) < 2:
        return []
    keys = [(phase, level) for phase in phases for level in every]
    shape = (len(keys), samples.items)
    zeros, entries, products = np.zeros(shape), np.zeros(shape), np.zeros((len(keys), 2))
    for place, (phase, level) in enumerate(keys):
        node, rows = every[level], tables[level]
        if node.ok(task):
            weights = node.outputs(task)
            zeros[place] = node.zeros(rows, phases=[phase])
            entries[place] = node.entries(rows, phases=[phase])
            products[place] = (
                node.zeros(rows, weights, [phase]).sum(),
                node.entries(rows, weights, [phase]).sum(),
            )
    shares = resampled_shares(task, zeros, entries, samples.cluster, replicates, seed)
    return [
        {
            **dict.fromkeys(one.name for one in fields(CurvePoint)),
            **{"task": task, "kind": samples.kind, "level": level, "phase": phase},
            "status": "ok" if every[level].ok(task) else "failed",
            **_with_interval("sparsity", shares[:, place]),
            "parameter_sparsity": zero / whole if whole else None,
            "unfinished_items": None,
        }
        for place, ((phase, level), (zero, whole)) in enumerate(zip(keys, products, strict=True))
    ]


def phase_profile(node: NodeSamples, tasks: list[str]) -> dict[str, Profile]:
    """Induced sparsity by phase, tensor and layer, mean over the tasks that have the phase.

    Empty where the node's tasks have one phase together.
    """
    found: dict[str, list[Profile]] = {}
    for task in tasks:
        if node.ok(task):
            rows = node.rows(task)
            for phase in phases_of(rows):
                found.setdefault(phase, []).append(node.by_layer(rows, phase))
    if len(found) < 2:
        return {}
    return {phase: mean_profile(found[phase]) for phase in PHASES if phase in found}


def mean_profile(profiles: list[Profile]) -> Profile:
    """Mean over tasks, layer by layer; a layer that one of them has dense is dense."""
    mean: Profile = {}
    for tensor in profiles[0] if profiles else ():
        shares = np.array([one[tensor] for one in profiles], dtype=np.float64)
        mean[tensor] = [None if np.isnan(one) else one for one in np.mean(shares, axis=0).tolist()]
    return mean


def _with_interval(name: str, values: np.ndarray) -> dict[str, float | None]:
    """A value [0] and the 95 % interval of its replicates [1:]; None where there is none."""
    ends = interval(values[0], values[1:]) if len(values) > 1 else (np.nan, np.nan)
    found = zip((name, f"{name}_low", f"{name}_high"), (values[0], *ends), strict=True)
    return {key: float(value) if np.isfinite(value) else None for key, value in found}
