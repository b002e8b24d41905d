"""How much of the masks a low-rank predictor of the FFN's input foretells."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from sparsity_atlas.figures.panels import (
    empty,
    grid,
    label,
    legend,
    percent_axis,
    rule,
    select,
    with_parts,
)
from sparsity_atlas.figures.studies.neurons import levels_shown
from sparsity_atlas.figures.style import GREY, Dashes, Mark, heading, marks
from sparsity_atlas.studies.mask_table import RECALL
from sparsity_atlas.tables.read import Tables, in_order

PANELS = 12
DASHES: dict[str, Dashes] = {"weights": "-", "probe": "--"}
NAMES = {"weights": "maps cut to the rank", "probe": "least-squares probe"}
CHANCE: Dashes = (0, (1, 1.5))


def recall(tables: Tables) -> Figure:
    """Recall over the rank, of both predictors, and of a mask that keeps as many by chance."""
    rows = with_parts(tables.masks)
    rows = rows[rows["quantity"].isin(RECALL.values())]
    if rows.empty:
        return empty("No ranks of predictors were asked for (studies.predictors).")
    rows = rows.merge(levels_shown(tables))
    criteria, sizes = tables.criteria(), tables.by_size()
    found = list(rows[["criterion", "model"]].drop_duplicates().itertuples(index=False, name=None))
    keys, note = select(
        sorted(found, key=lambda key: (criteria.index(key[0]), sizes.index(key[1]))), PANELS
    )
    styles = marks(in_order(rows["site"]))
    figure, axes = grid(len(keys), height=2.2, share_x=False)
    for ax, (criterion, model) in zip(axes, keys, strict=True):
        panel = rows[(rows["criterion"] == criterion) & (rows["model"] == model)]
        for site, mark in styles.items():
            for name, quantity in RECALL.items():
                line = panel[(panel["site"] == site) & (panel["quantity"] == quantity)]
                _line(ax, line.sort_values("at"), mark, DASHES[name])
        levels = ", ".join(dict.fromkeys(panel["level"]))
        ax.set_title(f"{heading(model)}\n{criterion} {levels}")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        percent_axis(ax.yaxis)
    axes[0].set_ylim(0, 1.04)
    kinds = [
        Line2D([], [], color=GREY, linestyle=dashes, label=NAMES[name])
        for name, dashes in DASHES.items()
    ]
    legend(figure, styles, *kinds, rule("chance, of the probe's size", CHANCE))
    label(figure, "rank", "kept neurons that are foretold (%)", note)
    return figure


def _line(ax: Axes, line: pd.DataFrame, mark: Mark, dashes: Dashes) -> None:
    ax.fill_between(
        line["at"], line["low"], line["high"], color=mark.color, alpha=0.12, linewidth=0
    )
    ax.plot(line["at"], line["value"], color=mark.color, marker=mark.marker, linestyle=dashes)
    if dashes == DASHES["probe"]:
        ax.plot(line["at"], line["independent"], color=mark.color, linewidth=0.8, linestyle=CHANCE)
