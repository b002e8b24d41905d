"""Layer by layer: induced sparsity, and what the activations look like."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsity_atlas.figures.panels import (
    empty,
    grid,
    label,
    left_out,
    legend,
    of_tensor,
    percent_axis,
    rule,
    select,
    select_pairs,
    with_parts,
)
from sparsity_atlas.figures.style import GREY, heading, marks
from sparsity_atlas.tables.read import Tables, in_order, site_rank
from sparsity_atlas.terms import NAMED_PARTS

PANELS = 20
COLORS = "YlGnBu"
TICKS = 9


def layer_sparsity(tables: Tables) -> Figure:
    """Induced sparsity under the tasks: a panel a model, criterion and tensor, layer by level."""
    rows = tables.layers
    if rows.empty:
        return empty("No node.")
    columns = ["criterion", "model", "site", "tensor"]
    found = list(rows[columns].drop_duplicates().itertuples(index=False, name=None))
    criteria, sizes = tables.criteria(), tables.by_size()
    found.sort(key=lambda key: (criteria.index(key[0]), sizes.index(key[1]), site_rank(key[2])))
    keys, note = _whole_models(found)
    figure, axes = grid(len(keys), share_x=False, share_y=False)
    groups = rows.groupby(columns, sort=False)
    for ax, key in zip(axes, keys, strict=True):
        _heatmap(ax, groups.get_group(key))
        criterion, model, site, tensor = key
        name = heading(model, criterion) if len(criteria) > 1 else heading(model)
        ax.set_title(f"{name}\n{of_tensor(site, tensor)}")
    scale = ScalarMappable(Normalize(0, 100), COLORS)
    bar = figure.colorbar(scale, ax=axes, shrink=0.5, aspect=30, pad=0.01)
    bar.set_label("induced sparsity (%)")
    bar.outline.set_visible(False)
    label(figure, "level, from mild to harsh", "layer", note)
    return figure


def _whole_models(found: list[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], str]:
    """Where not all panels fit: the first criterion, and of its models as many as do."""
    if len(found) <= PANELS:
        return found, ""
    first = [key for key in found if key[0] == found[0][0]]
    models = list(dict.fromkeys(key[1] for key in first))
    most = max(sum(key[1] == model for key in first) for model in models)
    kept, _ = select(models, max(1, PANELS // most))
    keys = [key for key in first if key[1] in kept][:PANELS]
    return keys, left_out(len(keys), len(found))


def _heatmap(ax: Axes, rows: pd.DataFrame) -> None:
    table = rows.pivot(index="layer", columns="level", values="sparsity")
    table = 100 * table[table.mean().sort_values(kind="stable").index]
    sns.heatmap(table, ax=ax, cmap=COLORS, vmin=0, vmax=100, cbar=False)
    ax.invert_yaxis()
    ax.set(xlabel="", ylabel="")
    step = -(-len(table.columns) // TICKS)
    ax.set_xticks(np.arange(0, len(table.columns), step) + 0.5, table.columns[::step], rotation=90)
    step = -(-len(table) // TICKS)
    ax.set_yticks(np.arange(0, len(table), step) + 0.5, table.index[::step], rotation=0)
    ax.tick_params(length=1.5, labelsize=6)
    ax.grid(visible=False)


def output_error(tables: Tables) -> Figure:
    """FFN-output error over induced sparsity, both on the captured text."""
    rows = tables.output_error
    if "part" in rows:  # layers as they are; the table has their parts, too
        rows = rows[rows["part"] == ""]
    if rows.empty:
        return empty("No node.")
    several = len(tables.criteria()) > 1
    keys, note = select_pairs(tables, rows, PANELS)
    styles = marks(in_order(rows["site"]))
    figure, axes = grid(len(keys))
    for ax, (criterion, model) in zip(axes, keys, strict=True):
        panel = rows[(rows["criterion"] == criterion) & (rows["model"] == model)]
        for site, mark in styles.items():
            line = panel[panel["site"] == site].sort_values("sparsity")
            x, low, high = line["sparsity"], line["error_low"], line["error_high"]
            ax.fill_between(x, low, high, color=mark.color, alpha=0.15, linewidth=0)
            ax.plot(x, line["error"], color=mark.color, marker=mark.marker, linestyle=mark.dashes)
        ax.set_title(heading(model, criterion) if several else heading(model))
        percent_axis(ax.xaxis)
        percent_axis(ax.yaxis)
    axes[0].set_ylim(0, 1.05 * rows["error_high"].max())
    legend(figure, styles)
    label(figure, "induced sparsity (%), captured text", "relative FFN-output error (%)", note)
    return figure


def effective_rank(tables: Tables) -> Figure:
    """Effective rank of each layer's activations, as a share of their width; of experts one by one."""
    # Experts with few rows have none.
    rows = with_parts(tables.metrics.dropna(subset="effective_rank_share"))
    if rows.empty:
        return empty("No captured activations.")
    keys, note = select(_models_and_parts(tables, rows), PANELS)
    styles = marks(in_order(rows["tensor"]))
    figure, axes = grid(len(keys), share_x=False)
    for ax, key in zip(axes, keys, strict=True):
        for tensor, mark in styles.items():
            line = _of(rows, key, tensor).sort_values("layer")
            experts = line.groupby("layer")["effective_rank_share"]
            if len(line) > len(experts):
                low, high = experts.min(), experts.max()
                ax.fill_between(low.index, low, high, color=mark.color, alpha=0.15, linewidth=0)
                line = experts.mean().reset_index()
            ax.plot(
                line["layer"],
                line["effective_rank_share"],
                color=mark.color,
                marker=mark.marker,
                linestyle=mark.dashes,
            )
        ax.set_title(heading(*filter(None, key)))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        percent_axis(ax.yaxis)
    axes[0].set_ylim(0, 1.08 * rows["effective_rank_share"].max())
    legend(figure, styles)
    label(figure, "layer", "effective rank (% of the width)", note)
    return figure


def _models_and_parts(tables: Tables, rows: pd.DataFrame) -> list[tuple[str, str]]:
    """What has a panel: models by their size, and the parts of each."""
    there = set(rows[["model", "part"]].itertuples(index=False, name=None))
    wanted = [(model, part) for model in tables.by_size() for part in ("", *NAMED_PARTS)]
    return [key for key in wanted if key in there]


def _of(rows: pd.DataFrame, key: tuple[str, str], tensor: str) -> pd.DataFrame:
    model, part = key
    return rows[(rows["model"] == model) & (rows["part"] == part) & (rows["tensor"] == tensor)]


def magnitudes(tables: Tables) -> Figure:
    """Distribution of the entries' magnitudes over all layers, on a logarithmic axis."""
    rows = with_parts(tables.magnitudes)
    if rows.empty:
        return empty("No captured activations.")
    keys, note = select(_models_and_parts(tables, rows), PANELS)
    styles = marks(in_order(rows["tensor"]))
    figure, axes = grid(len(keys))
    shown = rows[rows["share"] > 1e-4]
    for ax, key in zip(axes, keys, strict=True):
        for tensor, mark in styles.items():
            line = _of(rows, key, tensor).sort_values("low")
            middle = (line["low"] + line["high"]) / 2
            ax.plot(
                middle,
                line["share"],
                color=mark.color,
                linestyle=mark.dashes,
                marker=mark.marker,
                markevery=(5, 20),
            )
        ax.axvline(0, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
        ax.set_title(heading(*filter(None, key)))
        percent_axis(ax.yaxis)
    axes[0].set_xlim(shown["low"].min(), shown["high"].max())
    axes[0].set_ylim(0, 1.08 * rows["share"].max())
    legend(figure, styles, rule("RMS of the layer"))
    label(figure, "log10(|v| / RMS), exact zeros left out", "entries in a bin of 0.05 (%)", note)
    return figure
