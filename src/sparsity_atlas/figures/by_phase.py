"""Phase by phase: what is induced in a prompt against what is in the text generated after it."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsity_atlas.figures.by_layer import PANELS
from sparsity_atlas.figures.panels import (
    empty,
    grid,
    label,
    legend,
    of_tensor,
    percent_axis,
    select,
)
from sparsity_atlas.figures.style import Mark, heading, marks
from sparsity_atlas.tables.read import Tables, site_rank
from sparsity_atlas.terms import PHASES

NOTHING = "One phase in all tasks of this run: nothing to compare."
# Lines of one phase in a panel.
LEVELS = 4
_KEY = ["criterion", "model", "site", "tensor"]


def phase_sparsity(tables: Tables) -> Figure:
    """Induced sparsity of each layer in each phase: a panel a model, criterion and tensor."""
    rows = tables.phases
    if rows.empty:
        return empty(NOTHING)
    found = list(rows[_KEY].drop_duplicates().itertuples(index=False, name=None))
    criteria, sizes = tables.criteria(), tables.by_size()
    found.sort(key=lambda key: (criteria.index(key[0]), sizes.index(key[1]), site_rank(key[2])))
    keys, note = select(found, PANELS)
    there = set(rows["phase"])
    styles = marks([phase for phase in PHASES if phase in there])
    figure, axes = grid(len(keys), share_x=False)
    groups = rows.groupby(_KEY, sort=False)
    for ax, key in zip(axes, keys, strict=True):
        _lines(ax, groups.get_group(key), styles)
        criterion, model, site, tensor = key
        name = heading(model, criterion) if len(criteria) > 1 else heading(model)
        ax.set_title(f"{name}\n{of_tensor(site, tensor)}")
    legend(figure, styles)
    label(figure, "layer", "induced sparsity (%)", note)
    return figure


def _lines(ax: Axes, rows: pd.DataFrame, styles: dict[str, Mark]) -> None:
    """Some levels, from mild to harsh, each with a line for each phase."""
    mean = rows.groupby("level")["sparsity"].mean().sort_values(kind="stable")
    levels, _ = select(list(mean.index), LEVELS)
    for level in levels:
        for phase, mark in styles.items():
            line = rows[(rows["level"] == level) & (rows["phase"] == phase)].sort_values("layer")
            ax.plot(
                line["layer"],
                line["sparsity"],
                color=mark.color,
                marker=mark.marker,
                linestyle=mark.dashes,
            )
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    percent_axis(ax.yaxis)
