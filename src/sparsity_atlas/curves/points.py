"""Curves of a task's score over induced sparsity, with bootstrap replicates and monotone fits."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsity_atlas.statistics.bootstrap import (
    Estimates,
    TaskSamples,
    average,
    estimate,
    interval,
)
from sparsity_atlas.statistics.isotonic import nonincreasing_fit, pool_ties
from sparsity_atlas.terms import EVERY_PHASE, Kind


@dataclass(frozen=True)
class Scores:
    """Scores, of which more is better, over sparsity: row 0 as measured, then replicates.

    Point 0 is the dense model, the others follow by sparsity. The score is retained accuracy, or
    minus the added loss in nats per token; -inf at a failed level.

    x, raw, fit: [1 + B, 1 + L] of the L levels whose sparsity is known; equal x are pooled in raw.
    order: [1 + B, L], the place of each of these levels among all levels.
    """

    x: np.ndarray
    raw: np.ndarray
    fit: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class CurvePoint:
    """One row of curves.csv: one level (or "dense") of one task (or "average").

    phase: whose sparsity it is. value: accuracy, or loss in nats per token. retained (accuracy only): value
    over dense value; added_loss (loss only): value minus dense value; fitted: the monotone fit of that one.
    *_low, *_high: 95 % interval by paired bootstrap, None with too few units to resample.
    A failed level has no value, and may have no sparsity.
    """

    task: str
    kind: Kind
    level: str
    phase: str
    status: Literal["ok", "failed"]
    sparsity: float | None
    sparsity_low: float | None
    sparsity_high: float | None
    value: float | None
    value_low: float | None
    value_high: float | None
    retained: float | None
    retained_low: float | None
    retained_high: float | None
    added_loss: float | None
    added_loss_low: float | None
    added_loss_high: float | None
    fitted: float | None


def estimate_all(
    tasks: Sequence[TaskSamples], replicates: int, seed: int, beside: Container[str] = ()
) -> list[Estimates]:
    """Estimates of each task, then of the average over the accuracy tasks if there are any.

    Args:
        tasks: samples of each.
        replicates: of the bootstrap.
        seed: of the bootstrap.
        beside: tasks that the average leaves out, since they are others with a text before their prompts.
    """
    estimates = [estimate(samples, replicates, seed) for samples in tasks]
    accuracies = [one for one in estimates if one.kind == "accuracy" and one.task not in beside]
    return [*estimates, average(accuracies)] if accuracies else estimates


def curve_points(every: Sequence[Estimates], levels: Sequence[str]) -> list[CurvePoint]:
    """Dense and every level of each of `estimate_all`.

    levels: names in the order of the samples' first axis.
    Raises ValueError if their number is not the samples' number of levels.
    """
    points = []
    for estimates in every:
        if len(estimates.failed) != len(levels):
            raise ValueError(f"{estimates.task}: {len(estimates.failed)} levels, names: {levels}")
        points += _points(estimates, levels)
    return points


def anchored_scores(estimates: Estimates) -> Scores:
    """Scores by sparsity and their non-increasing fit from the dense point on.

    Every score is relative to dense on the same samples, so the dense point is exact and has
    infinite weight in the fit: this is the plain fit of the levels, cut at the dense score. (Cut
    after the fit: a level that happens to beat dense still makes up for a neighbour that happens
    to fall short.) Levels weigh the same: pairing makes their noise common for the most part,
    and an estimate of the rest would itself be noise.
    """
    sign, dense = (1.0, 1.0) if estimates.kind == "accuracy" else (-1.0, 0.0)
    placed = np.flatnonzero(~np.isnan(estimates.sparsity[0]))
    score = sign * estimates.relative()[:, placed]
    score[:, estimates.failed[placed]] = -np.inf
    # A mild level may count a few natural zeros fewer than the dense model itself.
    start = estimates.dense_sparsity[:, None]
    x = np.maximum(estimates.sparsity[:, placed], start)
    order = np.argsort(x, axis=1, kind="stable")
    x = np.take_along_axis(x, order, axis=1)
    raw = pool_ties(x, np.take_along_axis(score, order, axis=1))
    anchor = np.full_like(start, dense)
    return Scores(
        x=np.hstack([start, x]),
        raw=np.hstack([anchor, raw]),
        fit=np.hstack([anchor, np.minimum(nonincreasing_fit(raw), dense)]),
        order=placed[order],
    )


def _points(estimates: Estimates, levels: Sequence[str]) -> list[CurvePoint]:
    accuracy = estimates.kind == "accuracy"
    scores = anchored_scores(estimates)
    fitted = np.full(1 + len(levels), np.nan)
    fitted[0] = scores.fit[0, 0]
    fitted[1 + scores.order[0]] = scores.fit[0, 1:]
    dense = np.full((len(estimates.value), 1), 1.0 if accuracy else 0.0)
    relative = np.hstack([dense, estimates.relative()])
    if not np.isfinite(estimates.dense_value[0]) or (accuracy and estimates.dense_value[0] == 0):
        relative[:], fitted[:] = np.nan, np.nan
    columns = {
        "sparsity": np.hstack([estimates.dense_sparsity[:, None], estimates.sparsity]),
        "value": np.hstack([estimates.dense_value[:, None], estimates.value]),
        "retained": relative if accuracy else np.full_like(relative, np.nan),
        "added_loss": np.full_like(relative, np.nan) if accuracy else relative,
    }
    cells = [{"fitted": _known(fit if accuracy else -fit)} for fit in fitted]
    for name, column in columns.items():
        for i, cell in enumerate(cells):
            value, replicates = column[0, i], column[1:, i]
            low, high = interval(value, replicates) if len(replicates) else (np.nan, np.nan)
            cell |= {name: _known(value)}
            cell |= {f"{name}_low": _known(low), f"{name}_high": _known(high)}
    failed = [not np.isfinite(estimates.dense_value[0]), *estimates.failed]
    return [
        CurvePoint(
            task=estimates.task,
            kind=estimates.kind,
            level=level,
            phase=EVERY_PHASE,
            status="failed" if failed[i] else "ok",
            **cells[i],
        )
        for i, level in enumerate(["dense", *levels])
    ]


def _known(number: float) -> float | None:
    # + 0.0 turns the -0.0 of a flipped sign into 0.0.
    return float(number) + 0.0 if np.isfinite(number) else None
