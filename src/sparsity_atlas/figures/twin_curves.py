"""Pairs of models: what the second loses more than the first at equal sparsity, and at the bars."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparsity_atlas.figures.panels import empty, grid, label, legend, percent_axis, rule, select
from sparsity_atlas.figures.score_curves import ALLOWED_LOSS
from sparsity_atlas.figures.style import GREY, Mark, heading, marks
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, in_order, records
from sparsity_atlas.tables.twins import ACCURACY, CRITICAL, SCORE
from sparsity_atlas.terms import AVERAGE

NOTHING = "No pair of models at one criterion and site in this run."
PAIRS = 6
_PAIR = ["criterion", "first", "second"]


def twins(tables: Tables) -> Figure:
    """A row a pair: differences of scores over induced sparsity, and of critical sparsities by site."""
    rows = tables.twins
    tasks = {key: _task(own) for key, own in rows.groupby(_PAIR, sort=False)}
    keys, note = select([key for key, task in tasks.items() if task], PAIRS)
    if not keys:
        return empty(NOTHING)
    shown = {
        key: own[own["task"] == tasks[key]]
        for key, own in rows.groupby(_PAIR, sort=False)
        if key in keys
    }
    styles = marks(in_order(site for own in shown.values() for site in own["site"]))
    figure, axes = grid(2 * len(keys), height=2.0, columns=2, share_x=False, share_y=False)
    for (criterion, first, second), left, right in zip(keys, axes[::2], axes[1::2], strict=True):
        own = shown[criterion, first, second]
        _differences(left, own[own["measure"] == SCORE], styles)
        _bars(right, own[(own["measure"] == CRITICAL) & (own["at"] == HEADLINE_BAR)], styles)
        several = len(tables.criteria()) > 1
        parts = [f"{second} − {first}", *([str(criterion)] if several else [])]
        left.set_title(heading(*parts))
        right.set_title(f"{tasks[criterion, first, second]}, {_named(own)}")
    unpaired = Line2D([], [], color=GREY, marker="o", mfc="white", linestyle="", label="not paired")
    legend(figure, styles, rule("the first", "-"), unpaired)
    label(
        figure,
        "left: induced sparsity (%); right: difference of critical sparsities (points)",
        "",
        note,
    )
    return figure


def _task(rows: pd.DataFrame) -> str | None:
    """What is shown of a pair: its first task with a loss, else the average, else its first task."""
    tasks = list(rows["task"].unique())
    losses = rows[(rows["kind"] != ACCURACY) & (rows["measure"] == CRITICAL)]["task"]
    chosen = [*losses[:1], *(task for task in tasks if task == AVERAGE), *tasks]
    return chosen[0] if chosen else None


def _named(rows: pd.DataFrame) -> str:
    """The headline bar as it is called."""
    labels = rows.loc[rows["at"] == HEADLINE_BAR, "label"]
    return "" if labels.empty else str(labels.iloc[0])


def _differences(ax: Axes, rows: pd.DataFrame, styles: dict[str, Mark]) -> None:
    if rows.empty:  # a loss beside a bound of one, or curves that have no sparsity in common
        ax.set_axis_off()
        ax.text(
            *(0.5, 0.5, "nothing to compare\nat equal sparsity"), ha="center", va="center",
            fontsize=7, color=GREY, transform=ax.transAxes,
        )  # fmt: skip
        return
    ax.axhline(0, color=GREY, linewidth=0.8)
    percent_axis(ax.xaxis)
    for site, mark in styles.items():
        line = rows[rows["site"] == site].sort_values("at")
        x, low, high = line["at"], line["difference_low"], line["difference_high"]
        ax.fill_between(x, low, high, color=mark.color, alpha=0.15, linewidth=0)
        ax.plot(
            x,
            line["difference"],
            color=mark.color,
            marker=mark.marker,
            linestyle=mark.dashes,
            markerfacecolor=mark.color if line["paired"].all() else "white",
        )
    if (rows["kind"] == ACCURACY).all():
        ax.set_ylabel("retained accuracy (%)")
        percent_axis(ax.yaxis)
    else:
        ax.set_ylabel("added loss (nats)")
        ax.set_yscale("symlog", linthresh=ALLOWED_LOSS, linscale=0.8)
        ax.yaxis.set_major_locator(FixedLocator([-1, -0.1, -0.01, 0, 0.01, 0.1, 1]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _bars(ax: Axes, rows: pd.DataFrame, styles: dict[str, Mark]) -> None:
    """A point a site, with its interval; a caret where it may go on beyond what was measured."""
    ax.axvline(0, color=GREY, linewidth=0.8)
    sites = [site for site in styles if site in set(rows["site"])]
    ax.set_yticks(range(len(sites)), sites)
    ax.set_ylim(len(sites) - 0.5, -0.5)
    percent_axis(ax.xaxis)
    for place, site in enumerate(sites):
        (row,) = records(rows[rows["site"] == site])
        mark = styles[site]
        if pd.isna(row.difference):
            ax.text(0, place, " beyond what was measured", va="center", fontsize=6, color=GREY)
            continue
        ax.plot(
            [row.difference_low, row.difference_high],
            [place, place],
            color=mark.color,
            linewidth=1.2,
        )
        ends = (
            (row.difference_low, "<", row.low_open or row.relation == "<="),
            (row.difference_high, ">", row.high_open or row.relation == ">="),
        )
        for end, caret, opened in ends:
            if opened:
                at = row.difference if pd.isna(end) else end
                ax.plot([at], [place], marker=caret, color=mark.color, markersize=4.5)
        face = mark.color if row.paired else "white"
        ax.plot(
            [row.difference], [place], marker=mark.marker, color=mark.color, markerfacecolor=face
        )
