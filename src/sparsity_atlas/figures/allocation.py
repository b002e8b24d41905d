"""Layer by level: what a layer costs by itself, and what an allocation makes of that."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparsity_atlas.figures.layers import COLORS, PANELS
from sparsity_atlas.figures.panels import empty, grid, label, select
from sparsity_atlas.figures.style import heading
from sparsity_atlas.tables import SITE_ORDER, Tables

NOTHING = "No criterion of this run has an allocation."
# Of the largest damage: what lies below is drawn alike.
FAINTEST = 1e-4


def sensitivity(tables: Tables) -> Figure:
    """Damage of each layer alone, a panel a model, criterion, site and tensor."""
    rows = tables.allocation
    if rows.empty or not (rows["damage"] > 0).any():
        return empty(NOTHING)
    largest = float(rows["damage"].max())
    norm = LogNorm(FAINTEST * largest, largest)
    shown = rows.assign(damage=rows["damage"].clip(lower=FAINTEST * largest))
    return _heatmaps(
        tables, shown[shown["sparsity"] > 0], "damage", norm, "damage of one layer alone"
    )


def own_sparsity(tables: Tables) -> Figure:
    """The layers' own sparsities at each target, a panel a model, criterion, site and tensor."""
    rows = tables.allocation
    if rows.empty:
        return empty(NOTHING)
    shown = rows.assign(own_sparsity=100 * rows["own_sparsity"])
    return _heatmaps(
        tables, shown, "own_sparsity", Normalize(0, 100), "the layer's own sparsity (%)"
    )


def _heatmaps(
    tables: Tables, rows: pd.DataFrame, column: str, norm: Normalize, meaning: str
) -> Figure:
    columns = ["model", "criterion", "site", "tensor"]
    sizes, criteria = tables.by_size(), list(rows["criterion"].unique())
    found = list(rows[columns].drop_duplicates().itertuples(index=False, name=None))
    found.sort(
        key=lambda key: (sizes.index(key[0]), criteria.index(key[1]), SITE_ORDER.index(key[2]))
    )
    keys, note = select(found, PANELS)
    figure, axes = grid(len(keys), share_x=False, share_y=False)
    groups = rows.groupby(columns, sort=False)
    for ax, key in zip(axes, keys, strict=True):
        model, criterion, site, tensor = key
        table = groups.get_group(key).pivot(index="layer", columns="sparsity", values=column)
        sns.heatmap(table, ax=ax, cmap=COLORS, norm=norm, cbar=False)
        ax.invert_yaxis()
        ax.set(xlabel="", ylabel="")
        step = -(-len(table.columns) // 7)
        ticks = np.arange(0, len(table.columns), step)
        names = [f"{100 * level:.6g}" for level in table.columns[::step]]
        ax.set_xticks(ticks + 0.5, names, rotation=0)
        step = -(-len(table) // 9)
        ax.set_yticks(np.arange(0, len(table), step) + 0.5, table.index[::step], rotation=0)
        ax.tick_params(length=1.5, labelsize=6)
        ax.grid(visible=False)
        what = site if site == tensor else f"{site}: {tensor}"
        ax.set_title(f"{heading(model, criterion)}\n{what}")
    scale = ScalarMappable(norm, COLORS)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    bar = figure.colorbar(scale, ax=axes, shrink=0.5, aspect=30, pad=0.01, format=plain)
    bar.set_label(meaning)
    bar.outline.set_visible(False)
    label(figure, "sparsity (%)", "layer", note)
    return figure
