"""Critical sparsity task by task."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sparsity_atlas.figures.panels import NO_VALUE, empty, label, select_pairs
from sparsity_atlas.figures.style import GREY, TALL, WIDE, shorten
from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, in_order
from sparsity_atlas.terms import AVERAGE

# Up to so many tasks, cells also hold intervals.
FEW_TASKS = 5
# Up to so many curves, one panel holds them.
FEW_CURVES = 25
TALL_ROW, LOW_ROW = 0.27, 0.165  # inches
COLORS = "YlGnBu"


def tasks(tables: Tables) -> Figure:
    """Sparsity at the headline bar, a column a task: few curves as rows of one panel, else by site."""
    rows = tables.critical_sparsity
    rows = rows[rows["bar"] == HEADLINE_BAR]
    if rows.empty:
        return empty("No curve.")
    if (rows["relation"] == "none").all():
        return empty(NO_VALUE)
    names = [task for task in rows["task"].unique() if task != AVERAGE]
    if rows[rows["kind"] == "accuracy"]["task"].nunique() > 2:  # the average is one of them
        names.append(AVERAGE)
    rows = rows.set_index(["criterion", "model", "site", "task"])
    curves = {key[:3] for key in rows.index}
    return (_one_panel if len(curves) <= FEW_CURVES else _by_site)(tables, rows, names)


def _one_panel(tables: Tables, rows: pd.DataFrame, names: list[str]) -> Figure:
    curves = {key[:3] for key in rows.index}
    sites = in_order(key[2] for key in curves)
    keys = [
        key
        for pair in itertools.product(tables.criteria(), tables.by_size())
        for site in sites
        if (key := (*pair, site)) in curves
    ]
    several = len(tables.criteria()) > 1
    width = min(WIDE, 3.4 + 0.55 * len(names))
    figure = Figure((width, TALL_ROW * len(keys) + 1.6), layout="constrained")
    ax = figure.subplots()
    _panel(ax, rows, keys, names)
    ax.set_yticks(
        np.arange(len(keys)) + 0.5,
        [
            " · ".join((shorten(m, 24), *([shorten(c, 10)] if several else []), s))
            for c, m, s in keys
        ],
        rotation=0,
    )
    _finish(figure, [ax])
    return figure


def _by_site(tables: Tables, rows: pd.DataFrame, names: list[str]) -> Figure:
    sites = in_order(rows.index.get_level_values("site"))
    few = len(names) <= FEW_TASKS
    across = min(len(sites), 3 if few else 2 if len(names) <= 12 else 1)
    down = -(-len(sites) // across)
    row_height = TALL_ROW if few else LOW_ROW
    room = int((TALL - 1.6 - 0.35 * down) / down / row_height)
    keys, note = select_pairs(tables, rows.reset_index(), room)
    several = len(tables.criteria()) > 1
    labels = [shorten(m, 24) + (f" · {shorten(c, 10)}" if several else "") for c, m in keys]

    width = WIDE if len(sites) > 1 else 4.6
    height = down * (row_height * len(keys) + 0.35) + 1.6
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for spare in axes.flat[len(sites) :]:
        spare.remove()
    panels = list(axes.flat[: len(sites)])
    for ax, site in zip(panels, sites, strict=True):
        _panel(ax, rows, [(*key, site) for key in keys], names)
        ax.set_title(site)
        ax.set_yticks(np.arange(len(keys)) + 0.5, labels, rotation=0)
    for ax in panels[-across:]:
        ax.tick_params(labelbottom=True)
    _finish(figure, panels, note)
    return figure


def _finish(figure: Figure, panels: list[Axes], note: str = "") -> None:
    bar = figure.colorbar(panels[0].collections[0], ax=panels, shrink=0.7, aspect=30, pad=0.01)
    bar.set_label("sparsity at the bar (%)")
    bar.outline.set_visible(False)
    label(figure, "without colour: not resolved   –: no value", note=note)


def _panel(
    ax: Axes, rows: pd.DataFrame, keys: list[tuple[str, str, str]], names: list[str]
) -> None:
    """One heatmap, curves by tasks.

    Only what is resolved has a colour, so that noise does not look like a pattern.
    """
    shape = len(keys), len(names)
    values, text = np.full(shape, np.nan), np.full(shape, "", dtype=object)
    for i, key in enumerate(keys):
        for j, name in enumerate(names):
            if (*key, name) in rows.index:
                # A whole key gives one row, which the stubs of pandas cannot tell.
                row = cast("pd.Series[Any]", rows.loc[(*key, name), :])
                text[i, j] = _cell(row, len(names) <= FEW_TASKS)
                values[i, j] = 100 * row["value"] if row["resolved"] else np.nan
    sns.heatmap(
        pd.DataFrame(values),
        ax=ax,
        cbar=False,
        cmap=COLORS,
        vmin=0,
        vmax=100,
    )
    ax.set(xlabel="", ylabel="")
    ax.set_xticks(np.arange(len(names)) + 0.5, [shorten(n, 18) for n in names], rotation=90)
    ax.tick_params(length=0, labelsize=6.5)
    ax.grid(visible=False)
    for i, j in np.argwhere(text != ""):
        # A frame, so that what has no colour differs from what was not measured.
        ax.add_patch(Rectangle((j, i), 1, 1, fill=False, edgecolor="0.75", linewidth=0.6))
        color = GREY if np.isnan(values[i, j]) else "black" if values[i, j] < 60 else "white"
        ax.text(j + 0.5, i + 0.5, text[i, j], ha="center", va="center", fontsize=5.3, color=color)


def _cell(row: pd.Series, interval: bool) -> str:
    if row["relation"] == "none":
        return "–"
    value = {"=": "", ">=": "≥", "<": "<"}[row["relation"]]
    if not interval:
        return f"{value}{100 * row['value']:.0f}"
    shown = f"{value}{100 * row['value']:.1f}"
    if pd.isna(row["interval_low"]):
        return shown
    opened = (row["low_open"], row["high_open"])
    return f"{shown}\n" + "–".join(
        in_percent(row["interval_low"], row["interval_high"], 0, opened=opened)
    )
