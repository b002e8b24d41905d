"""Measured speed-ups over sparsity, and over the tokens that are decoded together."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from sparsity_atlas.figures.panels import empty, grid, label, legend, percent_axis, rule, select
from sparsity_atlas.figures.style import GREY, Dashes, Mark, heading, marks
from sparsity_atlas.speed.speed_table import FIXED, FOUND, OK, TOKEN
from sparsity_atlas.tables.read import Tables, records

PANELS = 12
NAMES = {FOUND: "found at each token", FIXED: "fixed thresholds"}
IDEAL: Dashes = (0, (1, 1.5))
# Sparsities whose speed-up over tokens is shown, where the curve has no point of its own.
OVER_TOKENS: dict[float, Dashes] = {0.5: "-", 0.9: "--"}
# A speed-up above which a panel ends.
HIGHEST = 4.0
KEY = ["criterion", "model", "site", "timed"]
NOTHING = "Nothing was timed (speed in a run block)."


def whole(tables: Tables) -> Figure:
    """Whole tokens over sparsity, a panel for each curve."""
    return _over_sparsity(_measured(tables, parts=False), tables)


def parts(tables: Tables) -> Figure:
    """Maps of parts over sparsity, a panel for each kind of a curve."""
    return _over_sparsity(_measured(tables, parts=True), tables)


def batch(tables: Tables) -> Figure:
    """The speed-up over tokens that are decoded together, whole ones where these were timed."""
    rows = _measured(tables, parts=False)
    if rows.empty:
        rows = _measured(tables, parts=True)
    counts = rows.groupby(KEY, sort=False)["tokens"].transform("nunique")
    rows = rows[counts > 1]
    if rows.empty:
        return empty(NOTHING if tables.speed.empty else "One number of tokens was timed.")
    keys, note = select(_keys(rows, tables), PANELS)
    figure, axes = grid(len(keys), height=2.2)
    styles, machines = _styles(rows), _machines(rows)
    for ax, key in zip(axes, keys, strict=True):
        panel = _of(rows, key)
        for threshold, mark in styles.items():
            own = panel[panel["threshold"] == threshold]
            for wanted, dashes in OVER_TOKENS.items():
                line = own[(own["of"] == "") & (own["wanted"] == wanted)]
                ax.plot(line["tokens"], line["speedup"], color=mark.color, linestyle=dashes)
            first = next((one for one in own["of"] if one), None)
            dots = own[own["of"] == first]
            ax.plot(dots["tokens"], dots["speedup"], color=mark.color, marker="o", linestyle=":")
        _title(ax, key, panel, machines)
        ax.axhline(1, color=GREY, linewidth=0.6)
        ax.set_xscale("log", base=2)
        # Panels share their axis, and so its marks.
        ax.xaxis.set_major_locator(FixedLocator(sorted(rows["tokens"].unique())))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(ScalarFormatter())
    lines = [
        Line2D([], [], color=GREY, linestyle=dashes, label=f"{wanted:.0%} dropped")
        for wanted, dashes in OVER_TOKENS.items()
    ]
    dot = Line2D([], [], color=GREY, marker="o", linestyle=":", label="where the curve crosses")
    legend(figure, {NAMES[name]: mark for name, mark in styles.items()}, *lines, dot)
    label(figure, "tokens decoded together", "times as fast as dense", _note(rows, note))
    return figure


def _over_sparsity(rows: pd.DataFrame, tables: Tables) -> Figure:
    if rows.empty:
        refused = not tables.speed.empty
        return empty("Nothing of it could be timed; speed.csv says why." if refused else NOTHING)
    rows = rows[rows["tokens"] == rows.groupby(KEY)["tokens"].transform("min")]
    keys, note = select(_keys(rows, tables), PANELS)
    figure, axes = grid(len(keys), height=2.2)
    styles, machines = _styles(rows), _machines(rows)
    for ax, key in zip(axes, keys, strict=True):
        panel = _of(rows, key)
        ideal = panel.drop_duplicates("sparsity").sort_values("sparsity")
        ax.plot(ideal["sparsity"], ideal["ideal_speedup"], color=GREY, linestyle=IDEAL)
        for threshold, mark in styles.items():
            line = panel[panel["threshold"] == threshold].sort_values("sparsity")
            _spread(ax, line, mark)
            ax.plot(line["sparsity"], line["speedup"], color=mark.color)
            dots = line[line["of"] != ""]
            ax.plot(
                *(dots["sparsity"], dots["speedup"]), color=mark.color, marker="o", markersize=5,
                markeredgecolor="white", markeredgewidth=0.6, linestyle="none", zorder=4,
            )  # fmt: skip
        _title(ax, key, panel, machines)
        ax.axhline(1, color=GREY, linewidth=0.6)
        percent_axis(ax.xaxis)
    fastest = max(rows["speedup"].max(), rows["ideal_speedup"].max())
    axes[0].set_ylim(0, min(1.08 * fastest, HIGHEST))
    dot = Line2D([], [], color=GREY, marker="o", linestyle="none", label="where the curve crosses")
    names = {NAMES[name]: mark for name, mark in styles.items()}
    legend(figure, names, rule("ideal by bytes", IDEAL), dot)
    label(figure, "induced sparsity (%)", "times as fast as dense", _note(rows, note))
    return figure


def _measured(tables: Tables, *, parts: bool) -> pd.DataFrame:
    """Rows of what was timed, of whole tokens those at the shortest context."""
    rows = tables.speed[tables.speed["status"] == OK]
    rows = rows[(rows["timed"] != TOKEN) == parts]
    if parts or rows.empty:
        return rows
    return rows[rows["context"] == rows.groupby(KEY)["context"].transform("min")]


def _keys(rows: pd.DataFrame, tables: Tables) -> list[tuple[str, ...]]:
    criteria, sizes = tables.criteria(), tables.by_size()
    found = list(rows[KEY].drop_duplicates().itertuples(index=False, name=None))
    return sorted(found, key=lambda key: (criteria.index(key[0]), sizes.index(key[1])))


def _of(rows: pd.DataFrame, key: tuple[str, ...]) -> pd.DataFrame:
    for column, value in zip(KEY, key, strict=True):
        rows = rows[rows[column] == value]
    return rows.sort_values("tokens", kind="stable")


def _styles(rows: pd.DataFrame) -> dict[str, Mark]:
    """Lines are told by their colour; dots are the curve's own points."""
    both = marks(list(NAMES))
    there = set(rows["threshold"])
    return {name: Mark(mark.color, "", "-") for name, mark in both.items() if name in there}


def _machines(rows: pd.DataFrame) -> dict[str, str]:
    """Machines and types of a figure's times, each with a letter; an empty one where there is one."""
    named = list(dict.fromkeys(_machine(row) for row in records(rows)))
    letters = ascii_lowercase if len(named) > 1 else [""]
    return dict(zip(named, letters, strict=False))


def _machine(row: Any) -> str:
    return f"{row.device}, {row.dtype}"


def _title(ax: Axes, key: tuple[str, ...], panel: pd.DataFrame, machines: dict[str, str]) -> None:
    criterion, model, site, timed = key
    what = "" if timed == TOKEN else f": {timed}"
    letter = machines[_machine(next(records(panel)))]
    ax.set_title(f"{heading(model)}\n{criterion}, {site}{what}{letter and f' ({letter})'}")


def _spread(ax: Axes, line: pd.DataFrame, mark: Mark) -> None:
    """A band as wide as the distance between the quartiles of the sparse times."""
    share = line["sparse_spread_us"] / line["sparse_us"] / 2
    low, high = line["speedup"] * (1 - share), line["speedup"] * (1 + share)
    ax.fill_between(line["sparsity"], low, high, color=mark.color, alpha=0.15, linewidth=0)


def _note(rows: pd.DataFrame, note: str) -> str:
    """What the times are of."""
    machines = [f"{letter and f'({letter}) '}{one}" for one, letter in _machines(rows).items()]
    least, how = [int(one) for one in sorted(rows["tokens"].unique())], []
    if rows["timed"].eq(TOKEN).all():
        context = ", ".join(f"{one:g}" for one in sorted(rows["context"].unique()))
        how.append(f"context of {context} tokens")
    if len(least) == 1:
        how.append(f"{least[0]} token{'s' if least[0] > 1 else ''} at once")
    return "\n".join(filter(None, ("; ".join(machines), "; ".join(how), note)))
