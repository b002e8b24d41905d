"""Points with intervals: PPL-1% and critical sparsity of every model and site."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT

from sparsity_atlas.figures.panels import (
    CHARACTER,
    NO_VALUE,
    empty,
    label,
    of_nats,
    percent_axis,
    select_pairs,
)
from sparsity_atlas.figures.style import GREY, WIDE, Mark, broken, marks, shorten
from sparsity_atlas.tables.read import Tables, in_order, records
from sparsity_atlas.terms import AVERAGE

ROWS = 40
_MARKERS = {"=": "o", ">=": ">", "<": "<"}


def ppl_sparsity(tables: Tables) -> Figure:
    """PPL-1% sparsity of the headline's loss task."""
    task = tables.loss_task()
    if task is None:
        return empty("No task with a loss in this run.")
    rows = tables.headline(task)
    of = of_nats(rows)
    whose = "" if of == "loss" else f", of {of},"
    return _points(tables, rows, f"PPL-1% sparsity{whose} on {task} (%)")


def critical_sparsity(tables: Tables) -> Figure:
    """Critical sparsity at 99 % of dense accuracy, averaged over the accuracy tasks."""
    rows = tables.headline(AVERAGE)
    if rows.empty:
        return empty("No task with an accuracy in this run.")
    return _points(tables, rows, "critical sparsity at 99 % of dense accuracy, average (%)")


def _points(tables: Tables, rows: pd.DataFrame, x_label: str) -> Figure:
    if (rows["relation"] == "none").all():
        return empty(NO_VALUE)
    keys, note = select_pairs(tables, rows, ROWS)
    several = len(tables.criteria()) > 1
    names = [shorten(m, 26) + (f" · {shorten(c, 12)}" if several else "") for c, m in keys]
    styles = marks(in_order(rows["site"]))
    width = WIDE if len(styles) > 1 else 4.6
    figure = Figure((width, 0.2 * len(keys) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(styles), sharex=True, sharey=True, squeeze=False)[0]
    # A title that is wider than its panel would run into the next one, or out of the figure.
    letters = int((width - max(map(len, names)) * CHARACTER) / len(styles) / CHARACTER)
    for ax, (site, mark) in zip(axes, styles.items(), strict=True):
        ax.set_title(broken(site, letters))
        for place, (criterion, model) in enumerate(keys):
            chosen = (rows["criterion"] == criterion) & (rows["model"] == model)
            for row in records(rows[chosen & (rows["site"] == site)]):
                _point(ax, place, row, mark)
        percent_axis(ax.xaxis, 4)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(keys)), names)
    axes[0].set_ylim(len(keys) - 0.5, -0.5)
    _legend(figure, rows)
    label(figure, x_label, note=note)
    return figure


def _point(ax: Axes, place: int, row: Any, mark: Mark) -> None:
    if row.relation == "none":
        middle = ax.get_yaxis_transform()
        ax.text(0.5, place, "no value", ha="center", va="center", color=GREY, transform=middle)
        return
    ax.plot([row.interval_low, row.interval_high], [place, place], color=mark.color)
    # The interval goes on beyond the measured sparsities.
    if row.low_open:
        ax.plot(row.interval_low, place, color=mark.color, marker=CARETLEFT, markersize=4)
    if row.high_open:
        ax.plot(row.interval_high, place, color=mark.color, marker=CARETRIGHT, markersize=4)
    ax.plot(row.paper_value, place, color=GREY, marker="|", markersize=8, zorder=1.5)
    ax.plot(
        row.value,
        place,
        color=mark.color,
        marker=_MARKERS[row.relation],
        markersize=4.5,
        markerfacecolor=mark.color if row.resolved else "white",
    )


def _legend(figure: Figure, rows: pd.DataFrame) -> None:
    """Explain the marks that occur."""

    def sample(marker: str, name: str, **more: Any) -> Line2D:
        style: dict[str, Any] = {"color": "k", "linestyle": "none", "markersize": 5, **more}
        return Line2D([], [], marker=marker, label=name, **style)

    relations, unresolved = set(rows["relation"]), ~rows["resolved"].all()
    handles = [sample("o", "value, 95 % interval", linestyle="-")]
    if ">=" in relations:
        handles.append(sample(">", "at least: never below the bar"))
    if "<" in relations:
        handles.append(sample("<", "less than: below it at the first level"))
    if unresolved:
        handles.append(sample("o", "not resolved: the data cannot tell", markerfacecolor="white"))
    handles.append(sample("|", "largest measured sparsity above the bar", color=GREY, markersize=7))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=3 if figure.get_figwidth() == WIDE else 1
    )
