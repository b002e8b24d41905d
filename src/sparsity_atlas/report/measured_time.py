"""What the measured times come to: a table of the curves' own points, and advice in words.

The rules, of each curve that was timed and where it crosses the headline bar:

- whole tokens are spoken of, at the shortest context; maps where no whole token was timed;
- a curve that never crosses the bar is spoken of at its largest sparsity, and one that is below it from its
  first level on only as untold; that a crossing is not resolved is said;
- where a site has `SPARSE` of zeros or more with nothing dropped, these are spoken of by themselves, with
  fixed thresholds, once for a site;
- a gain is told from none where the two times lie further apart than half of what both spread;
- a number of tokens decoded together pays where one kind of threshold is `WORTH` times as fast as dense at
  the least, told from none, and all smaller numbers that were timed pay, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparsity_atlas.speed.speed_table import FIXED, FOUND, OK, TOKEN
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, records

WORTH = 1.05
# Of zeros in the dense model, from which on it counts as sparse by itself.
SPARSE = 0.1
_BY = {FOUND: "with thresholds found at each token", FIXED: "with fixed thresholds"}


@dataclass(frozen=True)
class Advice:
    """One sentence or two, and the table rows that they are read from."""

    text: str
    rows: tuple[str, ...]


def advices(tables: Tables, model: str) -> Iterator[Advice]:
    """What a model's zeros buy in time, a curve's own point each."""
    timed = tables.speed[(tables.speed["model"] == model) & (tables.speed["status"] == OK)]
    own = timed[timed["of"] != ""]
    for _, curve in own.groupby(["criterion", "site", "of"], sort=False):
        crossing = _crossing(tables, next(records(curve)))
        if crossing is None:
            continue
        whole = curve[curve["timed"] == TOKEN]
        if whole.empty:
            for _, maps in curve.groupby("timed", sort=False):
                yield _of_times(maps, crossing)
        else:
            yield _of_times(whole[whole["context"] == whole["context"].min()], crossing)


def own_zeros(tables: Tables, model: str) -> Iterator[Advice]:
    """What the zeros that a model has by itself buy in time, at each site that was timed."""
    rows = tables.speed
    rows = rows[
        (rows["model"] == model)
        & (rows["status"] == OK)
        & (rows["of"] == "")
        & (rows["wanted"] == 0)
        & (rows["threshold"] == FIXED)
        & (rows["sparsity"] >= SPARSE)
    ]
    for _, site in rows.groupby("site", sort=False):
        curve = site[site["criterion"] == site["criterion"].iloc[0]]
        whole = curve[curve["timed"] == TOKEN]
        chosen = [some for _, some in curve.groupby("timed", sort=False)]
        if not whole.empty:
            chosen = [whole[whole["context"] == whole["context"].min()]]
        for some in chosen:
            counts = sorted(some["tokens"].unique())
            first = next(records(some[some["tokens"] == counts[0]]))
            text = (
                f"Its own zeros at {first.site}, {first.sparsity:.1%} of the entries in a text of the run, "
                f"left out and nothing else: on {first.device} in {first.dtype} {_what(first)} "
                f"{_gain(first)}; by bytes it would be {first.ideal_speedup:.2f} times. "
                f"{_batch(some, counts)}"
            )
            yield Advice(text, (_named(some),))


def _crossing(tables: Tables, timed: Any) -> Any:
    """The row of critical_sparsity.csv that a curve's own point is; None: the curve was made anew since."""
    rows = tables.critical_sparsity
    same = rows[
        (rows["model"] == timed.model)
        & (rows["criterion"] == timed.criterion)
        & (rows["site"] == timed.site)
        & (rows["bar"] == HEADLINE_BAR)
        & (rows["task"] + " " + rows["bar_label"] == timed.of)
    ]
    return next(records(same), None)


def untold(tables: Tables, model: str) -> Iterator[Advice]:
    """What of a model has no time at a point of its own, and why."""
    rows = tables.speed[(tables.speed["model"] == model) & (tables.speed["status"] == OK)]
    for (criterion, site), some in rows.groupby(["criterion", "site"], sort=False):
        if (some["of"] == "").all():
            yield Advice(
                f"In time, of {criterion} at {site}: no sparsity is known at which the bar is kept, so that "
                "only shares of the entries were timed.",
                _all_of(model, criterion, site, some),
            )
    rows = tables.speed[(tables.speed["model"] == model) & (tables.speed["status"] != OK)]
    for (criterion, site, reason), some in rows.groupby(
        ["criterion", "site", "reason"], sort=False
    ):
        what = ", ".join("whole tokens" if one == TOKEN else one for one in some["timed"].unique())
        yield Advice(
            f"In time, of {criterion} at {site}: {what}: {reason}.",
            _all_of(model, criterion, site, some),
        )


def _all_of(model: str, criterion: Any, site: Any, rows: pd.DataFrame) -> tuple[str, ...]:
    """Where rows of a curve are found, by what was to be timed."""
    return tuple(
        f"speed.csv: {model}, {criterion}, {site}, {one}" for one in rows["timed"].unique()
    )


def _of_times(rows: pd.DataFrame, crossing: Any) -> Advice:
    """Of one thing that was timed at one point of a curve, for all numbers of tokens and both thresholds."""
    counts = sorted(rows["tokens"].unique())
    fewest = list(records(rows[rows["tokens"] == counts[0]]))
    first = fewest[0]
    gains = " and ".join(_gain(row) for row in fewest)
    by_bytes = " and ".join(dict.fromkeys(f"{row.ideal_speedup:.2f}" for row in fewest))
    where = f"where it crosses {first.of}"
    if crossing.relation == ">=":
        where = f"at the largest sparsity measured, where it does not yet cross {first.of}"
    if not crossing.resolved:
        where += ", as far as the data tell, which do not resolve it"
    text = (
        f"{first.criterion} at {first.site}, {where} ({first.sparsity:.1%} of the entries "
        f"dropped in a text of the run): on {first.device} in {first.dtype} {_what(first)} {gains}; by bytes "
        f"it would be {by_bytes} times. Dense is caught up with {', '.join(map(_pays, fewest))}. "
        f"{_batch(rows, counts)}"
    )
    if first.timed == TOKEN:
        text += f" Copies of weights take {first.copies_bytes / 2**20:.1f} MiB."
    return Advice(text, (critical_row(crossing), _named(rows)))


def _what(row: Any) -> str:
    """What a time is of."""
    together = f", {row.tokens:g} decoded together," if row.tokens > 1 else ""
    if row.timed == TOKEN:
        return f"a token behind {row.context:g} others{together} is"
    return f"its maps ({row.timed}){together} are"


def _gain(row: Any) -> str:
    text = f"{row.speedup:.2f} times as fast as dense {_BY[row.threshold]}"
    if not _told(row):
        text += " (not told from none by the spread of the times)"
    return text


def _pays(row: Any) -> str:
    """From which sparsity on."""
    pays = row.pays_from
    return f"{'at no sparsity' if pd.isna(pays) else f'from {pays:.0%} on'} {_BY[row.threshold]}"


def _told(row: Any) -> bool:
    """Whether the two times lie further apart than they spread."""
    spread: float = (row.dense_spread_us + row.sparse_spread_us) / 2
    apart: float = abs(row.dense_us - row.sparse_us)
    return apart > spread


def _batch(rows: pd.DataFrame, counts: list[int]) -> str:
    best = rows.groupby("tokens")["speedup"].max()
    # As it is shown: "1.05 times as fast" is a gain of 5 %.
    pay = {row.tokens for row in records(rows) if round(row.speedup, 2) >= WORTH and _told(row)}
    paying = []
    for count in counts:
        if count not in pay:
            break
        paying.append(count)
    tried = ", ".join(f"{count:g}" for count in counts)
    if not paying:
        return f"A gain of {WORTH - 1:.0%} is not reached at {counts[0]:g}: it does not pay there."
    if len(counts) == 1:
        return f"More than {counts[0]:g} together were not timed."
    if len(paying) == len(counts):
        return f"Of {tried} tokens decoded together all gain {WORTH - 1:.0%} at the least."
    stops = counts[len(paying)]
    return (
        f"Of {tried} tokens decoded together {paying[-1]:g} still gain {WORTH - 1:.0%}; with {stops:g} it "
        f"stops paying ({best[stops]:.2f} times)."
    )


def critical_row(row: Any) -> str:
    """Where a row of the critical sparsities is found."""
    return f"critical_sparsity.csv: {row.model}, {row.criterion}, {row.site}, {row.task}, {row.bar_label}"


def _named(rows: pd.DataFrame) -> str:
    """Where rows of one thing that was timed at one point of a curve are found."""
    first = next(records(rows))
    context = f", context {first.context:g}" if first.timed == TOKEN else ""
    counts = ", ".join(f"{one:g}" for one in sorted(rows["tokens"].unique()))
    thresholds = " and ".join(rows["threshold"].unique())
    return (
        f"speed.csv: {first.model}, {first.criterion}, {first.site}, {first.timed}{context}, "
        f"{counts} together, {thresholds}, {first.of or f'{first.wanted:.0%} wanted'}"
    )


def own_points(tables: Tables) -> list[dict[str, str]]:
    """The report's table: the curves' own points at the fewest tokens together, as they are shown."""
    rows = tables.speed[(tables.speed["status"] == OK) & (tables.speed["of"] != "")]
    key = ["model", "criterion", "site", "timed", "context"]
    fewest = rows.groupby(key, dropna=False)["tokens"].transform("min")
    return [_shown(row) for row in records(rows[rows["tokens"] == fewest])]


def _shown(row: Any) -> dict[str, str]:
    realised, pays = row.realised_share, row.pays_from
    what = f"token behind {row.context:g}" if row.timed == TOKEN else row.timed
    return {
        **{"model": row.model, "criterion": row.criterion, "site": row.site, "of": row.of},
        "timed": what + (f", {row.tokens:g} together" if row.tokens > 1 else ""),
        **{"threshold": row.threshold, "sparsity": f"{100 * row.sparsity:.1f}"},
        "dense": f"{_us(row.dense_us)} ± {_us(row.dense_spread_us / 2)}",
        "sparse": f"{_us(row.sparse_us)} ± {_us(row.sparse_spread_us / 2)}",
        **{"speedup": f"{row.speedup:.2f}", "ideal": f"{row.ideal_speedup:.2f}"},
        "realised": "" if pd.isna(realised) else f"{realised:.2f}",
        "pays": "never" if pd.isna(pays) else f"{100 * pays:.0f}",
        "copies": f"{row.copies_bytes / 2**20:.1f}",
        "machine": f"{row.device}, {row.dtype}",
    }


def _us(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if microseconds < 1000 else f"{microseconds:,.0f}"
