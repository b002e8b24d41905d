"""Curves: how a score changes as more of a site is dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparsity_atlas.figures.panels import (
    NO_VALUE,
    empty,
    grid,
    label,
    left_out,
    legend,
    of_nats,
    percent_axis,
    repeated,
    rule,
    select,
    select_pairs,
)
from sparsity_atlas.figures.style import GREY, Mark, heading, marks
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, in_order, site_rank
from sparsity_atlas.terms import AVERAGE, IN_NATS

PANELS, MODEL_PANELS = 20, 12
ALLOWED_LOSS = math.log(2 - HEADLINE_BAR)
# Outside these shares of dense accuracy a curve says no more about the bars.
CUT, HIGHEST = 0.8, 1.1
X_LABEL = "induced sparsity (%)"
RETAINED_LABEL = "retained accuracy (% of dense)"
NATS_LABEL = "added {} (nats/token, log above bar)"


@dataclass(frozen=True)
class Score:
    """Which columns of curves.csv a panel shows, and where its headline bar is."""

    column: str
    dense: float
    bar: float


RETAINED = Score("retained", 1.0, HEADLINE_BAR)
ADDED = Score("added_loss", 0.0, ALLOWED_LOSS)
_SCORES = {"accuracy": RETAINED, **dict.fromkeys(IN_NATS, ADDED)}


def added_loss(tables: Tables) -> Figure:
    """Added loss, or bound, of the headline's loss task, one panel a model and criterion, a line a site."""
    task = tables.loss_task()
    if task is None:
        return empty("No task with a loss in this run.")
    return _by_model(tables, task, f"{X_LABEL} under {task}")


def retained_accuracy(tables: Tables) -> Figure:
    """Retained accuracy, averaged over the accuracy tasks, like `added_loss`."""
    if not (tables.curves["kind"] == "accuracy").any():
        return empty("No task with an accuracy in this run.")
    return _by_model(tables, AVERAGE, f"{X_LABEL}, average over tasks")


def criteria(tables: Tables) -> Figure:
    """Criteria at equal sparsity, one panel a model and site where there are several of them."""
    task = tables.loss_task() or AVERAGE
    rows = tables.curves[tables.curves["task"] == task]
    several = repeated(rows, ["model", "site"], "criterion")
    if not several:
        return empty("One criterion a model and site in this run: nothing to compare.")
    order = {model: place for place, model in enumerate(tables.by_size())}
    several.sort(key=lambda key: (order[key[0]], site_rank(key[1])))
    keys, note = select(several, PANELS)
    rows = rows[[key in keys for key in zip(rows["model"], rows["site"], strict=True)]]
    # Of those alone that are shown, in the colours that they have elsewhere.
    shown = set(rows["criterion"])
    styles = {name: mark for name, mark in marks(tables.criteria()).items() if name in shown}
    figure, axes = grid(len(keys), height=2.0)
    for ax, (model, site) in zip(axes, keys, strict=True):
        panel = rows[(rows["model"] == model) & (rows["site"] == site)]
        ax.set_title(heading(model, site))
        _lines(ax, panel, "criterion", styles)
    _finish(figure, axes, [rows["kind"].iloc[0]] * len(axes), styles)
    label(figure, X_LABEL, _y_label(rows), note)
    return figure


def all_tasks(tables: Tables) -> Figure:
    """The tasks of one model, one panel a criterion and task, a line a site.

    Where there are too many, only what the headline numbers are read from.
    """
    rows = tables.curves
    if rows.empty:
        return empty("No curve.")
    pairs = list(rows[["criterion", "task"]].drop_duplicates().itertuples(index=False, name=None))
    pairs.sort(key=lambda pair: tables.criteria().index(pair[0]))
    several = len(tables.criteria()) > 1
    headline = [pair for pair in pairs if pair[1] in (tables.loss_task(), AVERAGE)]
    keys, note = select(pairs if len(pairs) <= MODEL_PANELS else headline, MODEL_PANELS)
    note = note or (left_out(len(keys), len(pairs)) if len(keys) < len(pairs) else "")
    styles = marks(in_order(rows["site"]))
    # Loss and accuracy share no range, so that each panel has its own.
    figure, axes = grid(len(keys), share_y=False)
    kinds = []
    for ax, (criterion, task) in zip(axes, keys, strict=True):
        panel = rows[(rows["criterion"] == criterion) & (rows["task"] == task)]
        kinds.append(panel["kind"].iloc[0])
        unit = f"added {kinds[-1]} (nats)" if kinds[-1] in IN_NATS else "retained (%)"
        ax.set_title(heading(task, criterion) if several else heading(task))
        ax.set_ylabel(unit, fontsize=6.5)
        _lines(ax, panel, "site", styles)
    _finish(figure, axes, kinds, styles)
    label(figure, X_LABEL, note=note)
    return figure


def _y_label(rows: pd.DataFrame) -> str:
    """What the scores of some rows are, all of them of one task or average."""
    return NATS_LABEL.format(of_nats(rows)) if of_nats(rows) else RETAINED_LABEL


def _by_model(tables: Tables, task: str, x_label: str) -> Figure:
    rows = tables.curves[tables.curves["task"] == task]
    if rows.empty:
        return empty("No curve.")
    if rows[_SCORES[rows["kind"].iloc[0]].column].isna().all() and "failed" not in set(
        rows["status"]
    ):
        return empty(NO_VALUE)
    several = len(tables.criteria()) > 1
    keys, note = select_pairs(tables, rows, PANELS)
    styles = marks(in_order(rows["site"]))
    figure, axes = grid(len(keys))
    for ax, (criterion, model) in zip(axes, keys, strict=True):
        panel = rows[(rows["criterion"] == criterion) & (rows["model"] == model)]
        ax.set_title(heading(model, criterion) if several else heading(model))
        _lines(ax, panel, "site", styles)
    _finish(figure, axes, [rows["kind"].iloc[0]] * len(axes), styles)
    label(figure, x_label, _y_label(rows), note)
    return figure


def _lines(ax: Axes, rows: pd.DataFrame, by: str, styles: dict[str, Mark]) -> None:
    """Points as measured, their intervals as a band, and the monotone fit as a line."""
    score = _SCORES[rows["kind"].iloc[0]]
    for name in styles:
        line = rows[(rows[by] == name) & rows["sparsity"].notna()].sort_values("sparsity")
        mark = styles[name]
        good = line[line[score.column].notna()]
        x = good["sparsity"]
        low, high = good[f"{score.column}_low"], good[f"{score.column}_high"]
        ax.fill_between(x, low, high, color=mark.color, alpha=0.15, linewidth=0)
        ax.plot(x, good["fitted"], color=mark.color, linestyle=mark.dashes)
        ax.plot(x, good[score.column], color=mark.color, marker=mark.marker, linestyle="none")
        failed = line[line["status"] == "failed"]["sparsity"].tolist()
        _on_edge(ax, failed, 0.97, color=mark.color, marker="x")


def _finish(
    figure: Figure, axes: Sequence[Axes], kinds: Sequence[str], styles: dict[str, Mark]
) -> None:
    """Bars, scales and the legend."""
    for ax, kind in zip(axes, kinds, strict=True):
        score = _SCORES[kind]
        ax.axhline(score.dense, color=GREY, linewidth=0.8)
        ax.axhline(score.bar, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
        percent_axis(ax.xaxis)
    for kind in dict.fromkeys(kinds):
        same = [ax for ax, one in zip(axes, kinds, strict=True) if one == kind]
        (_loss_scale if kind in IN_NATS else _accuracy_scale)(same)
    names = {"accuracy": "99 % of dense", **dict.fromkeys(IN_NATS, "PPL + 1 %")}
    bars = " / ".join(dict.fromkeys(names[kind] for kind in kinds))
    legend(figure, styles, rule("dense", "-"), rule(bars))


def _loss_scale(axes: Sequence[Axes]) -> None:
    low = min(min(ax.dataLim.y0 for ax in axes), -0.2 * ALLOWED_LOSS)
    high = max(max(ax.dataLim.y1 for ax in axes), 3 * ALLOWED_LOSS)
    for ax in axes:
        ax.set_yscale("symlog", linthresh=ALLOWED_LOSS, linscale=0.8)
        ax.set_ylim(max(1.3 * low, -10 * ALLOWED_LOSS), 1.3 * high)
        ax.yaxis.set_major_locator(FixedLocator([-0.1, -0.01, 0, 0.01, 0.1, 1, 10, 100]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _accuracy_scale(axes: Sequence[Axes]) -> None:
    low = max(min(min(ax.dataLim.y0 for ax in axes), 0.97), CUT)
    high = min(max(max(ax.dataLim.y1 for ax in axes), 1.01), HIGHEST)
    for ax in axes:
        for line in list(ax.lines):
            _mark_cut(ax, line, low, high)
        margin = 0.05 * (high - low)
        ax.set_ylim(low - margin, high + margin)
        percent_axis(ax.yaxis)


def _mark_cut(ax: Axes, line: Line2D, low: float, high: float) -> None:
    """Points beyond the ends appear on the edges as open triangles."""
    if line.get_marker() in ("None", "x"):
        return
    points = list(zip(*(np.asarray(one, dtype=float) for one in line.get_data()), strict=True))
    look: dict[str, Any] = {"color": line.get_color(), "fillstyle": "none"}
    _on_edge(ax, [x for x, y in points if y < low], 0.02, marker="v", **look)
    _on_edge(ax, [x for x, y in points if y > high], 0.98, marker="^", **look)


def _on_edge(ax: Axes, places: Sequence[float], height: float, **style: Any) -> None:
    """Marks at some sparsities and a share of the panel's height."""
    transform = ax.get_xaxis_transform()
    ax.plot(places, [height] * len(places), linestyle="none", transform=transform, **style)
