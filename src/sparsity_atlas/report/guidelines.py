"""What to take from the numbers, in words by stated rules. Every sentence names the rows that it is of.

The rules, for each model and the headline bar (PPL-1%, or the same of a bound; 99 % of accuracy):

- of all curves whose crossing is resolved, the one with the largest ideal speed-up at it is recommended;
  curves whose interval of it overlaps that of the recommended one are named as not told apart;
- with a predictor that names the zeros of `intermediate` beforehand, rows of the factors' maps are spared as
  well: of a gated FFN three maps for one. What such a predictor costs and misses is not in it;
- activations count as sparse by themselves from `SPARSE` of exact zeros at `intermediate` on, in the dense
  model;
- tokens that are decoded together share what is read: of masks that have nothing to do with each other, a
  share s of one becomes s^B. A batch pays as long as the ideal speed-up is `WORTH` at least;
- where times were measured, they say what it buys, by the rules of `measured_time`;
- what is not resolved, or has no crossing, or could not be timed, is said to be untold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sparsity_atlas.report import measured_time
from sparsity_atlas.report.measured_time import WORTH, Advice
from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, records
from sparsity_atlas.terms import AVERAGE, EVERY_PHASE, IN_NATS

SPARSE = 0.1
LARGEST_BATCH = 64


@dataclass(frozen=True)
class Guideline:
    """What is advised for one model, by heading."""

    model: str
    advices: list[tuple[str, list[Advice]]]


def guidelines(tables: Tables) -> list[Guideline]:
    """Those of each model, the smallest first."""
    return [Guideline(model, list(_of_model(tables, model))) for model in tables.by_size()]


def _of_model(tables: Tables, model: str) -> Iterator[tuple[str, list[Advice]]]:
    rows = tables.critical_sparsity
    rows = rows[(rows["model"] == model) & (rows["bar"] == HEADLINE_BAR)]
    curves = tables.curves[tables.curves["model"] == model]
    loss = rows[rows["kind"].isin(IN_NATS)]
    loss = loss[loss["task"] == tables.loss_task()]
    average = rows[rows["task"] == AVERAGE]
    nothing = [
        advice
        for some, measure in ((loss, "PPL-1% sparsity"), (average, "critical sparsity"))
        if (advice := _untrained(some, curves, measure)) is not None
    ]
    if nothing:
        yield "When nothing may be trained", nothing
    described = tables.models[tables.models["model"] == model].iloc[0]
    predicted = _predicted(loss, curves, gated="gate" in described["sites"].split())
    if predicted is not None:
        yield "When a predictor may be trained", [predicted]
    own = _by_itself(curves)
    if own is not None:
        yield "What is sparse already", [own]
    in_time = list(measured_time.advices(tables, model))
    if in_time:
        yield "What it buys in time", in_time
    untold = [*_untold(pd.concat([loss, average])), *measured_time.refusals(tables, model)]
    if untold:
        yield "What cannot be told", untold


def _untrained(rows: pd.DataFrame, curves: pd.DataFrame, measure: str) -> Advice | None:
    """The curve that saves most, among those whose crossing is resolved."""
    usable = rows[rows["resolved"] & rows["ideal_speedup"].notna()]
    if usable.empty:
        return None
    ranked = list(records(usable.sort_values("ideal_speedup", ascending=False, kind="stable")))
    best = ranked[0]
    low, high = _speedups(best, curves)
    text = (
        f"{best.criterion} at {best.site}: {measure} {_sparsity(best)}{_task(best)}. "
        f"If time were weight bytes a token would take {1 / best.ideal_speedup:.0%} of its time, "
        f"{best.ideal_speedup:.2f} times as fast ({low:.2f} to {high:.2f}){_batch(best.value, best)}."
    )
    others = [one for one in ranked[1:] if _speedups(one, curves)[1] >= low]
    if others:
        named = ", ".join(
            f"{one.criterion} at {one.site} ({one.ideal_speedup:.2f})" for one in others
        )
        text += f" Not told apart from it: {named}."
    return Advice(text, tuple(_row(one) for one in (best, *others)))


def _predicted(rows: pd.DataFrame, curves: pd.DataFrame, *, gated: bool) -> Advice | None:
    """What the zeros of i would spare if they were known before u and g are made."""
    usable = rows[
        rows["resolved"] & rows["ideal_speedup"].notna() & (rows["site"] == "intermediate")
    ]
    if usable.empty:
        return None
    best = max(records(usable), key=lambda one: one.ideal_speedup)
    maps = 3 if gated else 2
    bounds = [
        1 / (1 - maps * (1 - 1 / one)) for one in (best.ideal_speedup, *_speedups(best, curves))
    ]
    text = (
        f"A predictor that names the entries of intermediate which {best.criterion} drops "
        f"({_sparsity(best)}) spares rows of {'both factors' if gated else 'W_u'} and of W_d: "
        f"{bounds[0]:.2f} times as fast ({bounds[1]:.2f} to {bounds[2]:.2f}) if it costs nothing and "
        f"never errs, where without it are {best.ideal_speedup:.2f}. What it gets wrong was not measured."
    )
    return Advice(text, (_row(best),))


def _by_itself(curves: pd.DataFrame) -> Advice | None:
    """Exact zeros of the dense model, which may be left out at no loss."""
    rows = curves[
        (curves["level"] == "dense")
        & (curves["site"] == "intermediate")
        & (curves["phase"] == EVERY_PHASE)
        & curves["sparsity"].notna()
    ]
    if rows.empty:
        return None
    row = next(records(rows))
    named = f"curves.csv: {row.model}, {row.criterion}, intermediate, {row.task}, dense"
    if row.sparsity < SPARSE:
        text = (
            f"Next to nothing: {row.sparsity:.1%} of the untouched model's intermediate entries are "
            "exact zeros, so that whatever is left out changes what it says."
        )
    else:
        text = (
            f"{row.sparsity:.1%} of the untouched model's intermediate entries are exact zeros: they may "
            f"be left out at no loss, at most {row.ideal_speedup:.2f} times as fast."
        )
    return Advice(text, (named,))


def _untold(rows: pd.DataFrame) -> Iterator[Advice]:
    """Curves that no advice is read from, and why."""
    unusable = rows[~rows["resolved"]]
    for keys, some in unusable.groupby(["task", "relation"], sort=False):
        task, relation = map(str, keys)
        curves = [f"{row.criterion} at {row.site}" for row in records(some)]
        why = {
            "none": "there is no crossing: the dense model is no better than a guess, or no level ran",
            ">=": "no level that was measured crosses the bar for certain",
            "<": "the mildest level is below the bar already, or may be",
        }.get(relation, "its interval is too wide, or it was drawn from too few samples")
        yield Advice(
            f"By {task}, of {', '.join(dict.fromkeys(curves))}: {why}.",
            tuple(_row(row) for row in records(some)),
        )


def _speedups(row: Any, curves: pd.DataFrame) -> tuple[float, float]:
    """Ideal speed-ups at the ends of a crossing's interval."""
    points = curves[
        (curves["criterion"] == row.criterion)
        & (curves["site"] == row.site)
        & (curves["task"] == row.task)
        & (curves["phase"] == EVERY_PHASE)
        & curves["sparsity"].notna()
        & curves["ideal_speedup"].notna()
    ].sort_values("sparsity")
    shares = 1 - 1 / points["ideal_speedup"]
    ends = np.interp([row.interval_low, row.interval_high], points["sparsity"], shares)
    low, high = (1 / (1 - ends)).tolist()
    return low, high


def _batch(sparsity: float, row: Any) -> str:
    """At which batch it stops paying, if masks were independent."""
    whole = (1 - 1 / row.ideal_speedup) / sparsity if sparsity > 0 else 0.0
    paying = [
        batch for batch in range(1, LARGEST_BATCH + 1) if 1 / (1 - whole * sparsity**batch) >= WORTH
    ]
    if not paying:
        return "; that is less than it takes to be worth anything"
    if paying == [1]:
        return f"; two tokens with nothing in common gain less than {WORTH - 1:.0%} together"
    return (
        f"; of tokens with nothing in common, {paying[-1]} together still gain {WORTH - 1:.0%}, "
        "more do not"
    )


def _sparsity(row: Any) -> str:
    sign = {"=": "", ">=": "at least ", "<": "below "}[row.relation]
    low, high = in_percent(
        row.interval_low, row.interval_high, 1, opened=(row.low_open, row.high_open)
    )
    return f"{sign}{100 * row.value:.1f} % ({low} to {high})"


def _task(row: Any) -> str:
    if row.kind not in IN_NATS:
        return ", where 1 % of the accuracy over all tasks is lost"
    bound = "the bound of the " if row.kind == "bound" else "the "
    return f", where {bound}perplexity of {row.task} is 1 % higher"


def _row(row: Any) -> str:
    """Where a row of the critical sparsities is found."""
    return f"critical_sparsity.csv: {row.model}, {row.criterion}, {row.site}, {row.task}, {row.bar_label}"
