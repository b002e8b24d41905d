"""What to take from the numbers, in words by stated rules. Every sentence names the rows that it is of.

The rules, for each model and the headline bar (PPL-1%, or the same of a bound; 99 % of accuracy):

- of all curves whose crossing is resolved, or that resolvedly have none and never fall below the bar, the one
  with the largest ideal speed-up there is recommended; curves whose interval of it overlaps that of the
  recommended one are named as not told apart. Of losses the run's first one counts, or the model's;
- with a predictor that names the zeros of `intermediate` beforehand, rows of the factors' maps are spared as
  well: of a gated FFN three maps for one. What such a predictor costs and misses is not in it;
- activations count as sparse by themselves from `SPARSE` of exact zeros on in the dense model, at
  `intermediate`; where `gate` was measured, its zeros spare rows of the other factor as well;
- tokens that are decoded together share what is read: of masks that have nothing to do with each other, a
  share s of one becomes s^B. A batch pays as long as the ideal speed-up is `WORTH` at least. Nothing is said
  of batches in a mixture, whose tokens meet other experts, nor of masked diffusion, whose passes go over
  many tokens;
- where times were measured, they say what it buys, by the rules of `measured_time`;
- what is not resolved, or below the bar from its first level on, or could not be timed, is said to be untold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sparsity_atlas.report import measured_time
from sparsity_atlas.report.measured_time import WORTH, Advice, critical_row
from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, records
from sparsity_atlas.terms import AVERAGE, EVERY_PHASE, IN_NATS

SPARSE = 0.1


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
    if (loss["task"] == tables.loss_task()).any():
        loss = loss[loss["task"] == tables.loss_task()]
    else:
        loss = loss[loss["task"] == loss["task"].head(1).squeeze()]
    average = rows[rows["task"] == AVERAGE]
    described = tables.models[tables.models["model"] == model].iloc[0]
    alike = _alike(described)
    nothing = [
        advice
        for some, measure in ((loss, "PPL-1% sparsity"), (average, "critical sparsity"))
        if (advice := _untrained(some, curves, measure, alike)) is not None
    ]
    if nothing:
        yield "When nothing may be trained", nothing
    predicted = _predicted(loss, curves, gated="gate" in described["sites"].split())
    if predicted is not None:
        yield "When a predictor may be trained", [predicted]
    own = [advice for site in ("intermediate", "gate") if (advice := _by_itself(curves, site))]
    if own:
        yield "What is sparse already", own
    in_time = list(measured_time.advices(tables, model))
    if in_time:
        yield "What it buys in time", in_time
    untold = [*_untold(pd.concat([loss, average])), *measured_time.untold(tables, model)]
    for some in (loss, average):
        untold += [one for one in _not_timed(tables, some) if one not in untold]
    if untold:
        yield "What cannot be told", untold


def _alike(described: pd.Series) -> str:
    """Why nothing is said of tokens that are decoded together; empty: it is."""
    if described["kind"] == "diffusion":
        return "its passes go over many tokens, which together leave less unread"
    if described.get("active_parameters", described["parameters"]) != described["parameters"]:
        return "tokens decoded together meet other experts, and what they share was not measured"
    return ""


def _usable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows at whose sparsity the bar is kept, as far as can be told."""
    return rows[rows["resolved"] & (rows["relation"] != "<") & rows["ideal_speedup"].notna()]


def _ranked(rows: pd.DataFrame) -> list[Any]:
    """Those, from the largest ideal speed-up down."""
    usable = _usable(rows).sort_values("ideal_speedup", ascending=False, kind="stable")
    return list(records(usable))


def _not_timed(tables: Tables, rows: pd.DataFrame) -> Iterator[Advice]:
    """What is recommended and was not timed, in a run that times others."""
    for best in _ranked(rows)[:1] if len(tables.speed) else ():
        own = tables.speed[["model", "criterion", "site"]] == [
            best.model,
            best.criterion,
            best.site,
        ]
        if not own.all(axis=1).any():
            text = f"In time, of {best.criterion} at {best.site}: it was not timed."
            yield Advice(text, (critical_row(best),))


def _untrained(rows: pd.DataFrame, curves: pd.DataFrame, measure: str, alike: str) -> Advice | None:
    """The curve that saves most, among those that are usable."""
    if not (ranked := _ranked(rows)):
        return None
    best = ranked[0]
    low = _speedups(best, curves)[0]
    text = (
        f"{best.criterion} at {best.site}: {measure} {_sparsity(best)}{_task(best)}. "
        f"If time were weight bytes a token would take {1 / best.ideal_speedup:.0%} of its time, "
        f"{best.ideal_speedup:.2f} times as fast ({_between(best, curves)}); {alike or _batch(best)}."
    )
    others = [one for one in ranked[1:] if _speedups(one, curves)[1] >= low]
    if others:
        named = ", ".join(
            f"{one.criterion} at {one.site} ({one.ideal_speedup:.2f})" for one in others
        )
        text += f" Not told apart from it: {named}."
    return Advice(text, tuple(critical_row(one) for one in (best, *others)))


def _predicted(rows: pd.DataFrame, curves: pd.DataFrame, *, gated: bool) -> Advice | None:
    """What the zeros of i would spare if they were known before u and g are made."""
    usable = _usable(rows[rows["site"] == "intermediate"])
    if usable.empty:
        return None
    best = max(records(usable), key=lambda one: one.ideal_speedup)
    maps = 3 if gated else 2
    bounds = [
        1 / (1 - maps * (1 - 1 / one)) for one in (best.ideal_speedup, *_speedups(best, curves))
    ]
    text = (
        f"A predictor that names the entries of intermediate which {best.criterion} drops, "
        f"{_sparsity(best)}, spares rows of {'both factors' if gated else 'W_u'} and of W_d: "
        f"{bounds[0]:.2f} times as fast ({bounds[1]:.2f} to {bounds[2]:.2f}) if it costs nothing and "
        f"never errs, where without it are {best.ideal_speedup:.2f}. What it gets wrong was not measured."
    )
    return Advice(text, (critical_row(best),))


def _by_itself(curves: pd.DataFrame, site: str) -> Advice | None:
    """Exact zeros of the dense model, which may be left out at no loss."""
    rows = curves[
        (curves["level"] == "dense")
        & (curves["site"] == site)
        & (curves["phase"] == EVERY_PHASE)
        & curves["sparsity"].notna()
    ]
    if rows.empty:
        return None
    row = next(records(rows))
    named = f"curves.csv: {row.model}, {row.criterion}, {site}, {row.task}, dense"
    if row.sparsity < SPARSE:
        text = (
            f"Next to nothing: {row.sparsity:.1%} of the untouched model's {site} entries are "
            "exact zeros, so that whatever is left out changes what it says."
        )
    else:
        text = (
            f"{row.sparsity:.1%} of the untouched model's {site} entries are exact zeros: take {site} and no "
            f"criterion. Left out at no loss, they make it at most {row.ideal_speedup:.2f} times as fast."
        )
    return Advice(text, (named,))


def _untold(rows: pd.DataFrame) -> Iterator[Advice]:
    """Curves that no advice is read from, and why."""
    unusable = rows[~rows["resolved"] | (rows["relation"] == "<")]
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
            tuple(critical_row(row) for row in records(some)),
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


def _between(row: Any, curves: pd.DataFrame) -> str:
    """The interval of the ideal speed-up, with < and > where its ends lie beyond what was measured."""
    low, high = _speedups(row, curves)
    return f"{'<' if row.low_open else ''}{low:.2f} to {'>' if row.high_open else ''}{high:.2f}"


def _batch(row: Any) -> str:
    """At which batch it stops paying, if masks were independent."""
    gain, spared, least = f"{WORTH - 1:.0%}", 1 - 1 / row.ideal_speedup, 1 - 1 / WORTH
    if spared < least:
        return f"that is less than the {gain} from which on it is worth anything"
    if row.value >= 1:
        return f"any number of tokens together gains {gain}"
    # Of B tokens spared · s^(B - 1) stays unread.
    most = 1 + math.floor(math.log(least / spared) / math.log(row.value))
    if most == 1:
        return f"two tokens with nothing in common gain less than {gain} together"
    return f"of tokens with nothing in common, {most} together still gain {gain}, more do not"


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
