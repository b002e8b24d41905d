"""The tasks' scores where one layer alone is sparsified: curves of single layers, against their layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsity_atlas.figures.panels import (
    empty,
    grid,
    label,
    legend,
    of_nats,
    percent_axis,
    rule,
    select,
)
from sparsity_atlas.figures.score_curves import ADDED, PANELS, RETAINED
from sparsity_atlas.figures.style import GREY, Mark, heading, marks
from sparsity_atlas.tables.read import Tables, of_single_layers, site_rank
from sparsity_atlas.terms import AVERAGE, in_every_layer, layers_named

NOTHING = "No run block asks for several layers one by one."
# Levels that one panel shows.
LINES = 5
_KEY = ["model", "criterion", "whole", "task"]


def single_layers(tables: Tables) -> Figure:
    """Score over the layer that alone is sparsified, a line a level.

    A panel a model, criterion and site, for the headline's loss and for the average accuracy. A level at
    which one layer alone was measured has no line.
    """
    tasks = [task for task in (tables.loss_task(), AVERAGE) if task is not None]
    rows = of_single_layers(tables.curves)
    rows = rows[rows["task"].isin(tasks) & (rows["level"] != "dense") & rows["sparsity"].notna()]
    rows = rows.assign(
        whole=[in_every_layer(site) for site in rows["site"]],
        layer=[layers_named(site)[0] for site in rows["site"]],
    )
    if not rows.empty:
        measured = rows.groupby([*_KEY, "level"], sort=False)["layer"].transform("nunique")
        rows = rows[measured > 1]
    if rows.empty:
        return empty(NOTHING)
    sizes, criteria = tables.by_size(), tables.criteria()
    found = list(rows[_KEY].drop_duplicates().itertuples(index=False, name=None))
    found.sort(
        key=lambda key: (
            *(sizes.index(key[0]), criteria.index(key[1])),
            *(site_rank(key[2]), tasks.index(key[3])),
        )
    )
    keys, note = select(found, PANELS)
    figure, axes = grid(len(keys), height=2.0, share_x=False, share_y=False)
    groups = rows.groupby(_KEY, sort=False)
    styles = marks(_levels([groups.get_group(key) for key in keys]))
    for ax, key in zip(axes, keys, strict=True):
        model, criterion, site, task = key
        ax.set_title(f"{heading(model, criterion)}\n{heading(site, task)}")
        _lines(ax, groups.get_group(key), styles)
    names = [f"level {level}" for level in styles]
    bars = rule("PPL + 1 %, or 99 % of dense")
    legend(figure, dict(zip(names, styles.values(), strict=True)), rule("dense", "-"), bars)
    label(figure, "layer that alone is sparsified", note=note)
    return figure


def _levels(panels: list[pd.DataFrame]) -> list[str]:
    """The levels that are shown, from mild to harsh by what they induce."""
    rows = pd.concat(panels)
    induced = rows.groupby("level")["sparsity"].mean().sort_values()
    return select(list(induced.index), LINES)[0]


def _lines(ax: Axes, rows: pd.DataFrame, styles: dict[str, Mark]) -> None:
    nats = of_nats(rows)
    score = ADDED if nats else RETAINED
    for level, mark in styles.items():
        line = rows[(rows["level"] == level) & rows[score.column].notna()].sort_values("layer")
        x, low, high = (
            line[name] for name in ("layer", f"{score.column}_low", f"{score.column}_high")
        )
        ax.fill_between(x, low, high, color=mark.color, alpha=0.15, linewidth=0)
        ax.plot(x, line[score.column], color=mark.color, marker=mark.marker, linestyle=mark.dashes)
    ax.axhline(score.dense, color=GREY, linewidth=0.8)
    ax.axhline(score.bar, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    ax.set_ylabel(f"added {nats} (nats)" if nats else "retained (%)", fontsize=6.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if not nats:
        percent_axis(ax.yaxis)
