"""Layer by level: what a layer costs by itself, and what an allocation makes of that."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparsity_atlas.figures.by_layer import COLORS, PANELS
from sparsity_atlas.figures.panels import empty, grid, label, select, with_parts
from sparsity_atlas.figures.style import heading
from sparsity_atlas.tables.read import Tables, site_rank
from sparsity_atlas.terms import plain

NOTHING = "No criterion of this run has an allocation."
NO_STUDY = "No run block names levels of `sensitivity`."
NO_LOSS = "No layer by itself adds to the loss."
# Of the largest damage: what lies below is drawn alike.
FAINTEST = 1e-4


def sensitivity(tables: Tables) -> Figure:
    """Added loss of each layer alone, a panel a model, criterion, site and tensor, layer by level."""
    rows = tables.sensitivity
    if rows.empty:
        return empty(NO_STUDY)
    if not (rows["added_loss"] > 0).any():
        return empty(NO_LOSS)
    shown, norm = _logarithmic(rows, "added_loss")
    meaning = "added loss of one layer alone (nats)"
    return _heatmaps(tables, shown, "added_loss", norm, meaning, "level, from mild to harsh")


def damage(tables: Tables) -> Figure:
    """Damage of each layer alone, by which sparsity was allocated; panels as `sensitivity`."""
    rows = tables.allocation
    if rows.empty or not (rows["damage"] > 0).any():
        return empty(NOTHING)
    shown, norm = _logarithmic(rows, "damage")
    shown = _by_sparsity(shown[shown["sparsity"] > 0])
    return _heatmaps(tables, shown, "damage", norm, "damage of one layer alone")


def own_sparsity(tables: Tables) -> Figure:
    """The layers' own sparsities at each target, a panel a model, criterion, site and tensor."""
    rows = tables.allocation
    if rows.empty:
        return empty(NOTHING)
    shown = _by_sparsity(rows.assign(own_sparsity=100 * rows["own_sparsity"]))
    meaning = "the layer's own sparsity (%)"
    return _heatmaps(tables, shown, "own_sparsity", Normalize(0, 100), meaning)


def _by_sparsity(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(level=[f"{100 * share:.6g}" for share in rows["sparsity"]])


def _logarithmic(rows: pd.DataFrame, column: str) -> tuple[pd.DataFrame, LogNorm]:
    """Rows with a column on a logarithmic scale, its faint values (and gains) at the scale's end."""
    largest = float(rows[column].max())
    faintest = FAINTEST * largest
    return rows.assign(**{column: rows[column].clip(lower=faintest)}), LogNorm(faintest, largest)


def _heatmaps(
    tables: Tables,
    rows: pd.DataFrame,
    column: str,
    norm: Normalize,
    meaning: str,
    x_label: str = "sparsity (%)",
) -> Figure:
    """Heat maps of a column, layer by `level`, in the order of the sparsity that levels induce."""
    columns = ["model", "criterion", "site", "tensor", "part"]
    rows = with_parts(rows)
    sizes, criteria = tables.by_size(), list(rows["criterion"].unique())
    found = list(rows[columns].drop_duplicates().itertuples(index=False, name=None))
    found.sort(key=lambda key: (sizes.index(key[0]), criteria.index(key[1]), site_rank(key[2])))
    keys, note = select(found, PANELS)
    figure, axes = grid(len(keys), share_x=False, share_y=False)
    groups = rows.groupby(columns, sort=False)
    for ax, key in zip(axes, keys, strict=True):
        model, criterion, site, tensor, part = key
        group = groups.get_group(key)
        levels = group.groupby("level", sort=False)["sparsity"].mean().sort_values().index
        table = group.pivot(index="layer", columns="level", values=column)[list(levels)]
        sns.heatmap(table, ax=ax, cmap=COLORS, norm=norm, cbar=False)
        ax.invert_yaxis()
        ax.set(xlabel="", ylabel="")
        step = -(-len(levels) // 7)
        ax.set_xticks(np.arange(0, len(levels), step) + 0.5, levels[::step], rotation=0)
        step = -(-len(table) // 9)
        ax.set_yticks(np.arange(0, len(table), step) + 0.5, table.index[::step], rotation=0)
        ax.tick_params(length=1.5, labelsize=6)
        ax.grid(visible=False)
        what = site if plain(site) == tensor else f"{site}: {tensor}"
        ax.set_title(f"{heading(model, criterion)}\n{what}" + (f", {part}" if part else ""))
    scale = ScalarMappable(norm, COLORS)
    digits = FuncFormatter(lambda value, _: f"{value:g}")
    bar = figure.colorbar(scale, ax=axes, shrink=0.5, aspect=30, pad=0.01, format=digits)
    bar.set_label(meaning)
    bar.outline.set_visible(False)
    label(figure, x_label, "layer", note)
    return figure
