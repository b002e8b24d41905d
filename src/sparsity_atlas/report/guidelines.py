"""What to take from the numbers, in words by stated rules. Every sentence names the rows that it is of.

The rules, for each model and the headline bar (PPL-1%, or the same of a bound; 99 % of accuracy):

- of all curves whose crossing is resolved, or that resolvedly have none and never fall below the bar, the one
  with the largest ideal speed-up there is recommended; curves whose interval of it overlaps that of the
  recommended one are named as not told apart. Of losses the run's first one counts, or the model's. What the
  other measure says is read from the mildest level that drops as much, or the harshest there is;
- with a predictor that names the zeros of `intermediate` beforehand, rows of the factors' maps are spared as
  well: of a gated FFN three maps for one. What such a predictor costs and misses is not in it; what a
  least-squares probe of the largest rank missed is said, where it was tried;
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

import pandas as pd

from sparsity_atlas.report import measured_time
from sparsity_atlas.report.crossings import between, dropped, ranked, speedups, where_of
from sparsity_atlas.report.measured_time import SPARSE, WORTH, Advice, critical_row
from sparsity_atlas.report.predictor_advice import no_predictor, predicted
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, records
from sparsity_atlas.terms import AVERAGE, EVERY_PHASE, IN_NATS

NOTHING = 0.01


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
    measures = (loss, "PPL-1% sparsity", average), (average, "critical sparsity", loss)
    nothing = [
        advice
        for some, measure, other in measures
        if (advice := _untrained(some, curves, measure, alike, other)) is not None
    ]
    both = pd.concat([loss, average])
    if not nothing and len(both):
        text = "No curve can be named: of none is a sparsity known at which the bar is kept."
        nothing = [Advice(text, tuple(critical_row(row) for row in records(both)))]
    if nothing:
        yield "When nothing may be trained", nothing
    own = tables.masks[tables.masks["model"] == model]
    foretold = predicted(loss, curves, own, gated="gate" in described["sites"].split())
    if foretold is not None:
        yield "When a predictor may be trained", [foretold]
    zeros = [advice for site in ("intermediate", "gate") if (advice := _by_itself(curves, site))]
    if zeros:
        yield "What is sparse already", zeros
    in_time = [*measured_time.advices(tables, model), *measured_time.own_zeros(tables, model)]
    if in_time:
        yield "What it buys in time", in_time
    untold = [*_untold(both)]
    if len(both) and foretold is None:
        untold.append(no_predictor(model, loss))
    if len(both) and not zeros:
        text = "How much is zero by itself: nothing was measured at intermediate or gate."
        untold.append(Advice(text, (f"curves.csv: {model}, no dense row of these sites",)))
    untold += measured_time.untold(tables, model)
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


def _not_timed(tables: Tables, rows: pd.DataFrame) -> Iterator[Advice]:
    """What is recommended and was not timed, in a run that times others."""
    for best in ranked(rows)[:1] if len(tables.speed) else ():
        own = tables.speed[["model", "criterion", "site"]] == [
            best.model,
            best.criterion,
            best.site,
        ]
        if not own.all(axis=1).any():
            text = f"In time, of {best.criterion} at {best.site}: it was not timed."
            yield Advice(text, (critical_row(best),))


def _untrained(
    rows: pd.DataFrame, curves: pd.DataFrame, measure: str, alike: str, other: pd.DataFrame
) -> Advice | None:
    """The curve that saves most, among those that are usable.

    Args:
        rows: of one measure, critical sparsities.
        curves: of the model.
        measure: what it is called.
        alike: why nothing is said of tokens together.
        other: rows of the other measure.
    """
    if not (found := ranked(rows)):
        return None
    best = found[0]
    low = speedups(best, curves)[0]
    text = (
        f"{best.criterion} at {best.site}: {measure} {dropped(best)}{where_of(best)}. "
        f"If time were weight bytes a token would take {1 / best.ideal_speedup:.0%} of its time, "
        f"{best.ideal_speedup:.2f} times as fast ({between(best, curves)}); {alike or _batch(best)}."
    )
    others = [one for one in found[1:] if speedups(one, curves)[1] >= low]
    if others:
        named = ", ".join(
            f"{one.criterion} at {one.site} ({one.ideal_speedup:.2f})" for one in others
        )
        text += f" Not told apart from it: {named}."
    also = _by_the_other(best, other, curves)
    if also is None:
        return Advice(text, tuple(critical_row(one) for one in (best, *others)))
    rows_of_it = (critical_row(one) for one in (best, *others))
    return Advice(f"{text} {also.text}", (*rows_of_it, *also.rows))


def _by_the_other(best: Any, other: pd.DataFrame, curves: pd.DataFrame) -> Advice | None:
    """What the other measure says of a level that drops as much, or nearly; None: nothing."""
    own = (other["criterion"] == best.criterion) & (other["site"] == best.site)
    # What is no better than a guess loses nothing.
    own &= other["relation"] != "none"
    if not own.any():
        return None
    points = curves[
        (curves["criterion"] == best.criterion)
        & (curves["site"] == best.site)
        & (curves["task"] == other["task"].iloc[0])
        & (curves["phase"] == EVERY_PHASE)
        & (curves["level"] != "dense")
    ].sort_values("sparsity")
    if points.empty:
        return None
    enough = points[points["sparsity"] >= best.value]
    row = next(records(points[-1:] if enough.empty else enough))
    found = _kept(row) if row.kind not in IN_NATS else _raised(row)
    if found is None:
        return None
    named = f"curves.csv: {row.model}, {row.criterion}, {row.site}, {row.task}, {row.level}"
    return Advice(f"At level {row.level}, which drops {row.sparsity:.1%}, {found}.", (named,))


def _kept(row: Any) -> str | None:
    if pd.isna(row.retained_low):
        return None
    return (
        f"{row.retained:.1%} of the accuracy over all tasks is kept ({100 * row.retained_low:.1f} to "
        f"{100 * row.retained_high:.1f})"
    )


def _raised(row: Any) -> str | None:
    if pd.isna(row.added_loss_low):
        return None
    found = [
        100 * math.expm1(one) for one in (row.added_loss, row.added_loss_low, row.added_loss_high)
    ]
    bound = "the bound of the " if row.kind == "bound" else "the "
    change, low, high = found
    return f"{bound}perplexity of {row.task} changes by {change:+.1f} % ({low:+.1f} to {high:+.1f})"


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
        little = "Next to nothing" if row.sparsity < NOTHING else "Little"
        text = (
            f"{little}: {row.sparsity:.1%} of the untouched model's {site} entries are "
            "exact zeros, so that whatever else is left out changes what it says."
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
        measure = "average accuracy" if task == AVERAGE else task
        yield Advice(
            f"By {measure}, of {', '.join(dict.fromkeys(curves))}: {why}.",
            tuple(critical_row(row) for row in records(some)),
        )


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
