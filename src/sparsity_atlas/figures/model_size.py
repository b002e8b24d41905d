"""Sparsity against model size, within a family of models."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sparsity_atlas.figures.panels import (
    empty,
    grid,
    label,
    legend,
    percent_axis,
    repeated,
    select,
    size_text,
)
from sparsity_atlas.figures.style import GREY, Mark, heading, marks, wrap
from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, in_order, records, size_column
from sparsity_atlas.terms import AVERAGE

GROUPS = 6


def scaling(tables: Tables) -> Figure:
    """PPL-1% and critical sparsity over (active) non-embedding parameters, a panel a criterion and family."""
    family = tables.models.set_index("model")["family"]
    rows = tables.critical_sparsity.assign(family=tables.critical_sparsity["model"].map(family))
    rows = rows[(rows["bar"] == HEADLINE_BAR) & ~rows["model"].isin(tables.earlier())]
    tasks = [task for task in (tables.loss_task(), AVERAGE) if (rows["task"] == task).any()]
    counts = rows.groupby(["criterion", "family"], sort=False)["model"].nunique()
    groups = repeated(rows, ["criterion", "family"], "model")
    if not groups:
        return empty("No family with two models or more in this run: nothing to compare by size.")
    keys, note = select(groups, GROUPS)
    alone = sorted({key[1] for key in counts.index if not counts[:, key[1]].gt(1).any()})
    if alone:
        note = "\n".join(filter(None, (note, f"one model only, not shown: {'; '.join(alone)}")))
    styles = marks(in_order(rows["site"]))
    columns = min(len(keys), 3) if len(keys) > 1 else len(tasks)
    panels = [(key, task) for start in range(0, len(keys), columns) for task in tasks
              for key in keys[start : start + columns]]  # fmt: skip
    figure, axes = grid(len(panels), height=2.5, columns=columns, share_x=False, share_y=False)
    for ax, ((criterion, kin), task) in zip(axes, panels, strict=True):
        chosen = (rows["criterion"] == criterion) & (rows["family"] == kin)
        panel = rows[chosen & (rows["task"] == task)]
        lines = tables.scaling[
            (tables.scaling["criterion"] == criterion)
            & (tables.scaling["family"] == kin)
            & (tables.scaling["task"] == task)
            & (tables.scaling["bar"] == HEADLINE_BAR)
        ].set_index("site")
        lines = lines.loc[in_order(lines.index)]
        ax.set_title(heading(kin, criterion, width=84 // columns))
        of = "" if (panel["kind"] != "bound").all() else " (bound)"
        ax.set_ylabel(
            "critical sparsity, 99 % (%)" if task == AVERAGE else f"PPL-1% sparsity{of}, {task} (%)"
        )
        _panel(ax, panel, lines, styles)
        ax.set_xlabel(_words(panel, lines, 116 // columns), fontsize=6.2, color=GREY)
    legend(figure, styles)
    active = "active " if size_column(rows).startswith("active") else ""
    label(figure, f"{active}non-embedding parameters", note=note)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, lines: pd.DataFrame, styles: dict[str, Mark]) -> None:
    ax.set_xscale("log")
    middle = (len(styles) - 1) / 2
    for place, (site, mark) in enumerate(styles.items()):
        points = rows[(rows["site"] == site) & (rows["relation"] != "none")]
        # Sites side by side, so that their intervals do not hide each other.
        x = points[size_column(points)] * 1.04 ** (place - middle)
        ax.vlines(x, points["interval_low"], points["interval_high"], color=mark.color, linewidth=1)
        ax.plot(x, points["value"], color=mark.color, marker=mark.marker, linestyle="none")
        for row, at in zip(records(points), x, strict=True):
            if row.relation != "=":
                ax.annotate(
                    {">=": "≥", "<": "<"}[row.relation], (at, row.value), (-3, 0), ha="right",
                    va="center", fontsize=7, color=mark.color, textcoords="offset points",
                )  # fmt: skip
        if site in lines.index and lines.loc[site, "resolved"]:
            ends = points[size_column(points)].agg(["min", "max"]).to_numpy()
            fit = lines.loc[site, "intercept"] + lines.loc[site, "slope"] * np.log10(ends)
            ax.plot(ends, fit, color=mark.color, linestyle=mark.dashes)
    sizes = rows[size_column(rows)]
    wide = sizes.max() > 30 * sizes.min()
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=6))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    percent_axis(ax.yaxis)


def _words(rows: pd.DataFrame, lines: pd.DataFrame, width: int) -> str:
    """How many models, which slopes are resolved, and which are not."""
    said = []
    for site, line in lines[lines["resolved"]].iterrows():
        low, high = in_percent(line["low"], line["high"], 1)
        said.append(f"{site} {100 * line['slope']:+.1f} [{low}, {high}]")
    text = [f"{rows['model'].nunique()} models"]
    if said:
        text.append(f"points per tenfold: {'; '.join(said)}")
    missing = list(lines[~lines["resolved"]].index)
    if missing:
        text.append(f"slope not resolved: {', '.join(missing)}")
    return "\n".join(wrap(part, width) for part in text)
