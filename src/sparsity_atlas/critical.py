"""Critical sparsity: how much can be dropped before a model gets worse, with intervals.

The critical sparsity at a bar is where the non-increasing fit of retained accuracy over induced
sparsity falls below the bar. PPL-p% sparsity (arXiv 2411.02335) is the same for loss, at a bar of
dense loss + ln(1 + p). Both go through one path, the scores of `curves`.

The interval runs between the 2.5 % and 97.5 % percentiles of the crossing over paired bootstrap
replicates, each with a fit of its own. In simulations of paired, correlated items the percentiles
held the true crossing 93 to 96 times of 100 (91 with as few as 8 clusters); on accuracy the
reflected ("basic") bootstrap did so 52 to 93 times, because the bend of the curve skews the
crossing's distribution, and percentiles of the unfitted curve's first crossing 77 to 95 times,
because noise crosses early. For the same reasons the value itself leans low where noise is large:
for a true 0.50, on levels 0.1 apart, its mean was 0.43 at 400 items, 0.48 at 2,400 and 0.49 at
12,000; for PPL-1% 0.50 at 17,000 tokens.

A replicate that never falls below the bar counts as +inf, one that is below it at its first level
as -inf. An end of the interval among these is put at the largest or smallest measured sparsity
and marked open. The interval always holds the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsity_atlas.bootstrap import Estimates, Kind, TaskSamples, percentile_interval
from sparsity_atlas.curves import Scores, anchored_scores, estimate_all
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.isotonic import TOLERANCE, first_crossing

BARS = (0.995, 0.99, 0.98, 0.95)
RESOLVED_ITEMS = 2000
RESOLVED_BAR = 0.99

Relation = Literal["=", ">=", "<", "none"]


@dataclass(frozen=True)
class CriticalRow:
    """One row of critical_sparsity.csv: one task (or "average") at one bar.

    bar: the share of dense accuracy to retain; for loss, 1 - p of PPL-p%.
    value: critical sparsity. relation says how to read it: "=" the crossing; ">=" the fit never
        falls below the bar, value is the largest measured sparsity; "<" it is below at the first
        level, value is the smallest measured sparsity; "none" no value (dense accuracy not above
        chance, dense or every level without a usable result).
    interval_low, interval_high: 95 % interval; an open end lies beyond the measured sparsities.
        None with a single cluster.
    paper_value: largest measured sparsity at or above the bar, without fit or interpolation
        (arXiv 2509.00454); the dense point counts as measured.
    first_crossing: where the unfitted curve first falls below the bar, None if it never does.
    non_monotone: the unfitted curve returns to the bar after falling below it.
    resolved: False for critical sparsity by accuracy at a bar of 0.99 or tighter with fewer than
        2,000 items (the average: in all its tasks together).
    """

    task: str
    kind: Kind
    bar: float
    bar_label: str
    value: float | None
    relation: Relation
    interval_low: float | None
    interval_high: float | None
    low_open: bool
    high_open: bool
    paper_value: float | None
    first_crossing: float | None
    non_monotone: bool
    resolved: bool
    items: int
    dense_value: float | None
    chance: float | None


def critical(
    tasks: Sequence[TaskSamples],
    bars: Sequence[float] = BARS,
    replicates: int = 1000,
    seed: int = 0,
) -> list[CriticalRow]:
    """Critical sparsity of each task and of the average over accuracy tasks, at each bar.

    The average is over tasks of induced sparsity and accuracy at each level, normalised by the
    average dense accuracy afterwards; loss stays out of it. Same seed, same rows.
    Raises AtlasError for a bar outside (0, 1), ValueError for tasks of different levels.
    """
    for bar in bars:
        if not 0 < bar < 1:
            raise AtlasError(f"bars: {bar} found, each must lie strictly between 0 and 1")
    rows = []
    for estimates in estimate_all(tasks, replicates, seed):
        scores = anchored_scores(estimates) if _has_value(estimates) else None
        rows += [_row(estimates, scores, bar) for bar in bars]
    return rows


def bar_label(kind: Kind, bar: float) -> str:
    """Name of a bar: 99% (of dense accuracy), or PPL-1% for loss."""
    return f"{100 * bar:.6g}%" if kind == "accuracy" else f"PPL-{100 * (1 - bar):.6g}%"


def _threshold(kind: Kind, bar: float) -> float:
    return bar if kind == "accuracy" else -float(np.log1p(1 - bar))


def _has_value(estimates: Estimates) -> bool:
    """Dense has a result, better than guessing by its 95 % interval, and a level is placed.

    With a single cluster, which has no interval, the measured dense accuracy is compared.
    """
    dense = estimates.dense_value
    if not np.isfinite(dense[0]) or np.isnan(estimates.sparsity[0]).all():
        return False
    if estimates.kind == "loss":
        return True
    if estimates.chance is None or len(dense) == 1:
        return dense[0] > (estimates.chance or 0.0)
    return percentile_interval(dense[1:])[0] > estimates.chance


def _row(estimates: Estimates, scores: Scores | None, bar: float) -> CriticalRow:
    dense_value = float(estimates.dense_value[0])
    common = dict(
        task=estimates.task,
        kind=estimates.kind,
        bar=bar,
        bar_label=bar_label(estimates.kind, bar),
        resolved=estimates.kind == "loss"
        or bar < RESOLVED_BAR
        or estimates.items >= RESOLVED_ITEMS,
        items=estimates.items,
        dense_value=dense_value if np.isfinite(dense_value) else None,
        chance=estimates.chance,
    )
    if scores is None:
        return CriticalRow(
            **common,
            value=None,
            relation="none",
            interval_low=None,
            interval_high=None,
            low_open=False,
            high_open=False,
            paper_value=None,
            first_crossing=None,
            non_monotone=False,
        )
    threshold = _threshold(estimates.kind, bar)
    position, index = first_crossing(scores.x, scores.fit, threshold)
    crossing = np.where(index == 1, -np.inf, np.where(np.isnan(position), np.inf, position))
    smallest, largest = float(scores.x[0, 1]), float(scores.x[0, -1])
    value = float(np.clip(crossing[0], smallest, largest))
    relation: Relation = "="
    if np.isinf(crossing[0]):
        relation = ">=" if crossing[0] > 0 else "<"
    above = scores.raw[0] >= threshold - TOLERANCE
    first, _ = first_crossing(scores.x[:1], scores.raw[:1], threshold)
    return CriticalRow(
        **common,
        value=value,
        relation=relation,
        **_interval(crossing, smallest, largest),
        paper_value=float(scores.x[0, above].max()),
        first_crossing=None if np.isnan(first[0]) else float(first[0]),
        non_monotone=bool((np.diff(above.astype(int)) > 0).any()),
    )


def _interval(crossing: np.ndarray, smallest: float, largest: float) -> dict[str, object]:
    """Interval of the crossing [1 + B] within the measured sparsities, with its open ends."""
    if len(crossing) == 1:
        ends = dict.fromkeys(("interval_low", "interval_high"))
        return {**ends, "low_open": False, "high_open": False}
    low, high = percentile_interval(crossing[1:])
    low, high = min(low, crossing[0]), max(high, crossing[0])
    return {
        "interval_low": float(np.clip(low, smallest, largest)),
        "interval_high": float(np.clip(high, smallest, largest)),
        "low_open": bool(low == -np.inf),
        "high_open": bool(high == np.inf),
    }
