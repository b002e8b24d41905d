"""What a text before its prompts does to a task's scores: the same documents with and without it, paired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sparsity_atlas.curves.node_samples import NodeSamples
from sparsity_atlas.statistics.bootstrap import TaskSamples, estimate, interval


def inserted_rows(
    samples: Sequence[TaskSamples],
    befores: Mapping[str, str],
    dense: NodeSamples,
    levels: Sequence[str],
    replicates: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """A curve's rows of inserted.csv without what names it, of the dense model and of every level.

    A task with an insertion is set beside the one whose prompts it has, where both are among the samples and
    have the same documents. score: accuracy, or nats a token; difference: with the insertion less without.

    Args:
        samples: as `curve.all_samples` gives them.
        befores: of tasks with an insertion the task that they are made of.
        dense: the baseline, which names the documents.
        levels: of the samples' first axis.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    known = {one.task: one for one in samples}
    for task, before in befores.items():
        after, plain = known.get(task), known.get(before)
        if after is None or plain is None or _documents(dense, task) != _documents(dense, before):
            continue
        about = {"task": task, "before": before, "kind": after.kind, "items": after.items}
        both = zip(
            ("dense", *levels),
            (after.dense, *after.value),
            (plain.dense, *plain.value),
            strict=True,
        )
        for level, own, other in both:
            row = {**about, "level": level, **dict.fromkeys(("score_before", "score_after"))}
            row |= dict.fromkeys(("difference", "low", "high"))
            if np.isfinite(own).all() and np.isfinite(other).all():
                row |= _paired(_of_one_level(after, own, other), replicates, seed)
            yield row


def _of_one_level(task: TaskSamples, own: np.ndarray, other: np.ndarray) -> TaskSamples:
    """A task of one level, whose dense values are those without the insertion."""
    one = np.ones((1, len(own)), dtype=np.int64)
    alone = replace(task, dense_zeros=None, dense_entries=None, chance=None)
    return replace(alone, value=own[None], dense=other, zeros=0 * one, entries=one)


def _paired(task: TaskSamples, replicates: int, seed: int) -> dict[str, float | None]:
    found = estimate(task, replicates, seed)
    after, before = found.value[:, 0], found.dense_value
    difference = after - before
    ends: tuple[float | None, float | None] = (None, None)
    if len(difference) > 1:
        ends = interval(float(difference[0]), difference[1:])
    return {
        "score_before": float(before[0]),
        "score_after": float(after[0]),
        "difference": float(difference[0]),
        **dict(zip(("low", "high"), ends, strict=True)),
    }


def _documents(dense: NodeSamples, task: str) -> list[tuple[Any, ...]]:
    """Documents of a task, and what is scored of each: as many tokens, or an accuracy."""
    rows = dense.rows(task)
    names = ("leaf", "doc_id", "doc_hash", "predicted")
    return list(zip(*(rows[name].to_pylist() for name in names), strict=True))
