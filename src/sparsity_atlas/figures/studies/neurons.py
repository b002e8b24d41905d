"""How the masks of a sequence's tokens go together: over several tokens, distances, positions and neurons."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
from sparsity_atlas.figures.style import Dashes, Mark, heading, marks
from sparsity_atlas.studies.mask_table import EXACT, FREQUENCY, POSITION, REUSE, UNUSED
from sparsity_atlas.tables.read import Tables, in_order

NOTHING = "No masks of captured sequences."
PANELS = 12
# Of all levels the one at which a tensor's sparsity is nearest to this is shown.
MIDDLE = 0.5
INDEPENDENT: Dashes = (0, (4, 2))
BY_FREQUENCY: Dashes = (0, (1, 1.5))
_CHANCE = {"independent": INDEPENDENT, "by_frequency": BY_FREQUENCY}
_KEY = ["criterion", "model", "part"]


def unused(tables: Tables) -> Figure:
    """Neurons that none of several tokens keeps, and the line of independent tokens."""
    figure, axes = _draw(tables, UNUSED, "tokens one after the other", "unused neurons (%)")
    _doubling(axes)
    return figure


def reuse(tables: Tables) -> Figure:
    """What a token keeps of the neurons of another before it, over the distance."""
    what = "kept neurons that the other token keeps, too (%)"
    figure, axes = _draw(tables, REUSE, "distance in tokens", what)
    _doubling(axes)
    return figure


def position(tables: Tables) -> Figure:
    """Sparsity over the position in the sequence."""
    figure, axes = _draw(tables, POSITION, "position in the sequence", "sparsity (%)")
    for ax in axes:
        ax.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(_WHOLE)
    return figure


def frequency(tables: Tables) -> Figure:
    """How many neurons are kept how seldom."""
    what = "neurons that are kept so often at most (%)"
    figure, axes = _draw(tables, FREQUENCY, "share of tokens that keep a neuron (%)", what)
    for ax in axes:
        percent_axis(ax.xaxis)
    return figure


_WHOLE = FuncFormatter(lambda value, _: f"{value:g}")


def _doubling(axes: list[Axes]) -> None:
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(_WHOLE)


def _draw(tables: Tables, quantity: str, x: str, y: str) -> tuple[Figure, list[Axes]]:
    rows = with_parts(tables.masks)
    rows = rows[rows["quantity"] == quantity]
    if rows.empty:
        return empty(NOTHING), []
    rows = rows.merge(levels_shown(tables))
    criteria, sizes = tables.criteria(), tables.by_size()
    found = list(rows[_KEY].drop_duplicates().itertuples(index=False, name=None))
    found.sort(key=lambda key: (criteria.index(key[0]), sizes.index(key[1]), key[2]))
    keys, note = select(found, PANELS)
    # What a site of several tensors keeps of one follows from the others, too.
    styles = marks(in_order(rows["site"]))
    figure, axes = grid(len(keys), height=2.0)
    groups = rows.groupby(_KEY, sort=False)
    for ax, key in zip(axes, keys, strict=True):
        panel = groups.get_group(key)
        levels = []
        for site, mark in styles.items():
            for _, line in panel[panel["site"] == site].groupby("tensor", sort=False):
                _line(ax, line.sort_values("at"), mark)
                levels.append(str(line["level"].iloc[0]))
        criterion, model, part = key
        shown = f"{criterion} {', '.join(dict.fromkeys(levels))}"
        ax.set_title(f"{heading(*filter(None, (model, part)))}\n{shown}")
        percent_axis(ax.yaxis)
    axes[0].set_ylim(0, 1.04)
    drawn = rows["independent"].notna().any()
    others = (rule("independent entries", INDEPENDENT), rule("independent neurons", BY_FREQUENCY))
    legend(figure, styles, *(others if drawn else ()))
    label(figure, x, y, note)
    return figure, axes


def levels_shown(tables: Tables) -> pd.DataFrame:
    """Of each criterion, model, part, site and tensor the level whose sparsity is nearest to MIDDLE."""
    rows = with_parts(tables.masks)
    names = [*_KEY, "site", "tensor", "level"]
    alone = rows[(rows["quantity"] == UNUSED) & (rows["at"] == 1) & (rows["level"] != EXACT)]
    alone = alone.assign(distance=(alone["value"] - MIDDLE).abs())
    nearest = alone.groupby(names[:-1], sort=False)["distance"].idxmin()
    return alone.loc[nearest, names]


def _line(ax: Axes, line: pd.DataFrame, mark: Mark) -> None:
    """The mean over the layers, what lies between them, and what chance would make of it."""
    ax.fill_between(
        line["at"], line["low"], line["high"], color=mark.color, alpha=0.15, linewidth=0
    )
    ax.plot(
        *(line["at"], line["value"]), color=mark.color, marker=mark.marker, linestyle=mark.dashes
    )
    for column, dashes in _CHANCE.items():
        if line[column].notna().any():
            ax.plot(line["at"], line[column], color=mark.color, linewidth=0.8, linestyle=dashes)
