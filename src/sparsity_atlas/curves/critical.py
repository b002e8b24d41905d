"""Critical sparsity: how much can be dropped before a model gets worse, with intervals.

The critical sparsity at a bar is where the non-increasing fit of retained accuracy over induced
sparsity falls below the bar. PPL-p% sparsity (arXiv 2411.02335) is the same for loss, at a bar of
dense loss + ln(1 + p). Both go through one path, the scores of `curves`.

The interval runs between the 2.5 % and 97.5 % percentiles of the crossing over paired bootstrap
replicates, each with a fit of its own. In simulations of paired, correlated items the percentiles
held the true crossing 93 to 96 times of 100 (91 with as few as 12 clusters); on accuracy the
reflected ("basic") bootstrap did so 52 to 93 times, because the bend of the curve skews the
crossing's distribution, and percentiles of the unfitted curve's first crossing 77 to 95 times,
because noise crosses early. For the same reasons the value itself leans low where noise is large:
for a true 0.50, on levels 0.1 apart, its mean was 0.43 at 400 items, 0.48 at 2,400 and 0.49 at
12,000; for PPL-1% 0.50 at 17,000 tokens.

A replicate that never falls below the bar counts as +inf, one that is below it at its first level
as -inf. An end of the interval among these is put at the largest or smallest measured sparsity
and marked open. The interval always holds the value.

A bar is resolved if the data can tell it from dense; see `resolves`. In the same simulations at most 9
of 100 bars were called resolved by an interval that missed the truth, none of 8 items or 3 documents;
by the interval's width alone 33 of 100 were, of 8 items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sparsity_atlas.curves.points import Scores, anchored_scores
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.statistics.bootstrap import Estimates, interval, percentile_interval
from sparsity_atlas.statistics.isotonic import TOLERANCE, first_crossing
from sparsity_atlas.terms import IN_NATS, Kind

BARS = (0.995, 0.99, 0.98, 0.95)
# What a resolved bar needs; see `resolves`.
RESOLVED_UNITS = 20
RESOLVED_LOST = 3
RESOLVED_WIDTH = 0.25

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
        Its digits are those that the number of replicates supports. None with too few units.
    crossing_level, crossing_level_low, crossing_level_high: the criterion's level there, between the two
        levels around it on a straight line over their sparsities, with the interval of the crossings'; an
        end is open where that of the sparsity is. None where the levels were not given.
    paper_value: largest measured sparsity at or above the bar, without fit or interpolation
        (arXiv 2509.00454); the dense point counts as measured.
    first_crossing: where the unfitted curve first falls below the bar, None if it never does.
    non_monotone: the unfitted curve returns to the bar after falling below it.
    resolved: whether the data can tell this bar from dense; see `resolves`.
    items: samples. units: what was drawn independently, clusters or samples; of the average, the
        task's with the fewest.
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
    crossing_level: float | None
    crossing_level_low: float | None
    crossing_level_high: float | None
    paper_value: float | None
    first_crossing: float | None
    non_monotone: bool
    resolved: bool
    items: int
    units: int
    dense_value: float | None
    chance: float | None


def critical(
    every: Sequence[Estimates],
    bars: Sequence[float] = BARS,
    levels: Sequence[str] | None = None,
) -> list[CriticalRow]:
    """Critical sparsity of each of `points.estimate_all` at each bar.

    Args:
        every: the estimates.
        bars: shares of dense accuracy.
        levels: as spelled, in the order of the samples' first axis.

    The average is over tasks of induced sparsity and accuracy at each level, normalised by the
    average dense accuracy afterwards; loss stays out of it.
    Raises AtlasError for a bar outside (0, 1).
    """
    for bar in bars:
        if not 0 < bar < 1:
            raise AtlasError(f"bars: {bar} found, each must lie strictly between 0 and 1")
    rows = []
    for estimates in every:
        scores = usable(estimates)
        rows += [_row(estimates, scores, bar, levels) for bar in bars]
    return rows


def crossings(estimates: Estimates, scores: Scores, bar: float) -> np.ndarray:
    """Where the fit falls below a bar: [1 + B], row 0 as measured.

    +inf: it never does; -inf: it is below the bar at its first level.

    Args:
        estimates: of a task or the average.
        scores: its `anchored_scores`.
        bar: share of dense accuracy, or for a loss the matching rise in perplexity.
    """
    position, index = first_crossing(scores.x, scores.fit, _threshold(estimates.kind, bar))
    return np.where(index == 1, -np.inf, np.where(np.isnan(position), np.inf, position))


def crossing_levels(scores: Scores, crossing: np.ndarray, levels: Sequence[str]) -> np.ndarray:
    """The level at each crossing: [1 + B]; of one beyond what was measured, the level at that end.

    Args:
        scores: the curve, by sparsity.
        crossing: as `crossings` gives it.
        levels: as spelled, in the order of the samples' first axis.
    """
    own = np.array([float(level) for level in levels])[scores.order]
    x = scores.x[:, 1:]
    place = np.clip(crossing, x[:, 0], x[:, -1])
    right = np.minimum(np.maximum((x < place[:, None]).sum(axis=1), 1), x.shape[1] - 1)
    left = np.maximum(right - 1, 0)
    row = np.arange(len(x))
    width = x[row, right] - x[row, left]
    share = np.divide(place - x[row, left], width, out=np.zeros_like(width), where=width > 0)
    found: np.ndarray = own[row, left] + share * (own[row, right] - own[row, left])
    return found


def usable(estimates: Estimates) -> Scores | None:
    """The scores of a task or the average; None where no bar has a meaning, see `CriticalRow.relation`."""
    return anchored_scores(estimates) if _has_value(estimates) else None


def resolves(estimates: Estimates, bar: float, found: dict[str, Any]) -> bool:
    """Whether the data can tell a bar from dense.

    They were drawn from at least RESOLVED_UNITS units: with fewer, a bootstrap knows too little of how
    they differ. By accuracy, the bar allows to lose at least RESOLVED_LOST items: if none of n is lost,
    as many as 3 / n may be (the rule of three), and no replicate shows it. A crossing's interval lies
    within the measured sparsities and is no wider than RESOLVED_WIDTH; of `>=` and `<` all of the
    interval is beyond them.

    Args:
        estimates: of the task or the average.
        bar: its share of dense accuracy.
        found: value, relation and interval, as `CriticalRow` has them.
    """
    if found["relation"] == "none" or found["interval_low"] is None:
        return False
    allowed = (1 - bar) * estimates.dense_value[0] + TOLERANCE
    if estimates.kind == "accuracy" and allowed < RESOLVED_LOST * estimates.step:
        return False
    low, high = found["interval_low"], found["interval_high"]
    below, beyond = found["low_open"], found["high_open"]
    told = {
        # Of a single level both ends stand at the value, whichever side of it they lie on.
        ">=": low == found["value"] and not below,
        "<": high == found["value"] and not beyond,
        "=": not (below or beyond) and high - low <= RESOLVED_WIDTH,
    }
    return estimates.units >= RESOLVED_UNITS and told[found["relation"]]


def bar_label(kind: Kind, bar: float) -> str:
    """Name of a bar: 99% (of dense accuracy), PPL-1% for loss, or the same of its bound."""
    if kind == "accuracy":
        return f"{100 * bar:.6g}%"
    return f"PPL-{'bound-' if kind == 'bound' else ''}{100 * (1 - bar):.6g}%"


def _threshold(kind: Kind, bar: float) -> float:
    return bar if kind == "accuracy" else -float(np.log1p(1 - bar))


def _has_value(estimates: Estimates) -> bool:
    """Dense has a result, better than guessing by its 95 % interval, and a level is placed.

    With too few units for an interval, the measured dense accuracy is compared.
    """
    dense = estimates.dense_value
    if not np.isfinite(dense[0]) or np.isnan(estimates.sparsity[0]).all():
        return False
    if estimates.kind in IN_NATS:
        return True
    if estimates.chance is None or len(dense) == 1:
        return bool(dense[0] > (estimates.chance or 0.0))
    return bool(percentile_interval(dense[1:])[0] > estimates.chance)


def _row(
    estimates: Estimates, scores: Scores | None, bar: float, levels: Sequence[str] | None
) -> CriticalRow:
    dense_value = float(estimates.dense_value[0])
    common: dict[str, Any] = dict(
        task=estimates.task,
        kind=estimates.kind,
        bar=bar,
        bar_label=bar_label(estimates.kind, bar),
        items=estimates.items,
        units=estimates.units,
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
            crossing_level=None,
            crossing_level_low=None,
            crossing_level_high=None,
            paper_value=None,
            first_crossing=None,
            non_monotone=False,
            resolved=False,
        )
    threshold = _threshold(estimates.kind, bar)
    crossing = crossings(estimates, scores, bar)
    smallest, largest = float(scores.x[0, 1]), float(scores.x[0, -1])
    value = float(np.clip(crossing[0], smallest, largest))
    relation: Relation = "="
    if np.isinf(crossing[0]):
        relation = ">=" if crossing[0] > 0 else "<"
    above = scores.raw[0] >= threshold - TOLERANCE
    first, _ = first_crossing(scores.x[:1], scores.raw[:1], threshold)
    found: dict[str, Any] = {
        **{"value": value, "relation": relation},
        **_interval(crossing, value, smallest, largest),
    }
    return CriticalRow(
        **common,
        **found,
        **_level(scores, crossing, levels),
        paper_value=float(scores.x[0, above].max()),
        first_crossing=None if np.isnan(first[0]) else float(first[0]),
        non_monotone=bool((np.diff(above.astype(int)) > 0).any()),
        resolved=resolves(estimates, bar, found),
    )


def _level(scores: Scores, crossing: np.ndarray, levels: Sequence[str] | None) -> dict[str, Any]:
    """The crossing's level with its interval, as `CriticalRow` has them."""
    names = ("crossing_level", "crossing_level_low", "crossing_level_high")
    if levels is None:
        return dict.fromkeys(names)
    found = crossing_levels(scores, crossing, levels)
    if len(found) == 1:
        return {**dict.fromkeys(names), names[0]: float(found[0])}
    ends = interval(float(found[0]), found[1:])
    return dict(zip(names, (float(found[0]), *ends), strict=True))


def _interval(
    crossing: np.ndarray, value: float, smallest: float, largest: float
) -> dict[str, Any]:
    """Interval of the crossing [1 + B] within the measured sparsities, with its open ends."""
    if len(crossing) == 1:
        ends = dict.fromkeys(("interval_low", "interval_high"))
        return {**ends, "low_open": False, "high_open": False}
    low, high = percentile_interval(crossing[1:])
    low_end, high_end = interval(value, np.clip(crossing[1:], smallest, largest))
    return {
        "interval_low": max(low_end, smallest),
        "interval_high": min(high_end, largest),
        "low_open": bool(min(low, crossing[0]) == -np.inf),
        "high_open": bool(max(high, crossing[0]) == np.inf),
    }
