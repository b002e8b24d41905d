"""Expert by expert: how far those of a layer differ, and whether those that get many tokens do."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sparsity_atlas.figures.by_layer import COLORS, PANELS
from sparsity_atlas.figures.panels import (
    at_level,
    empty,
    grid,
    label,
    legend,
    percent_axis,
    rule,
    select,
)
from sparsity_atlas.figures.style import GREY, heading, marks
from sparsity_atlas.tables.read import Tables, site_rank, tensor_rank
from sparsity_atlas.terms import plain

NOTHING = "No node of a mixture of experts in this run."
BOXES = "0.75"
# Of all levels the one at which the experts' sparsity is nearest to this is shown.
MIDDLE = 0.5
DENSE = "dense"
_KEY = ["model", "criterion", "site", "tensor"]


def spread(tables: Tables) -> Figure:
    """The experts' sparsity layer by layer, with that of dense models' layers at the same level."""
    keys, note = select(_panels(tables), PANELS)
    if not keys:
        return empty(NOTHING)
    shown = {key: _shown(tables, key) for key in keys}
    beside = [model for model in tables.by_size() if any(model in one[1] for one in shown.values())]
    styles = marks(beside)
    figure, axes = grid(len(keys), height=2.2, share_x=False)
    for ax, (key, (rows, dense)) in zip(axes, shown.items(), strict=True):
        boxes = dict(rows.dropna(subset="sparsity").groupby("layer")["sparsity"].apply(list))
        ax.boxplot(
            list(boxes.values()), positions=[float(layer) for layer in boxes], widths=0.6, whis=(0, 100),
            patch_artist=True, boxprops={"facecolor": BOXES}, medianprops={"color": "black"},
            manage_ticks=False,
        )  # fmt: skip
        for model, line in dense.items():
            mark = styles[model]
            ax.plot(
                line["layer"],
                line["sparsity"],
                color=mark.color,
                marker=mark.marker,
                linestyle=mark.dashes,
            )
        ax.set_title(_title(key, rows))
        # One tick will do, where one layer alone has experts: else there were fractions of it.
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        percent_axis(ax.yaxis)
    box = Line2D([], [], color=BOXES, linewidth=6, label="a layer's experts")
    legend(figure, styles, box)
    label(figure, "layer", "induced sparsity (%)", note)
    return figure


def load(tables: Tables) -> Figure:
    """Each expert's sparsity over the share of tokens that were routed to it."""
    keys, note = select(_panels(tables), PANELS)
    if not keys:
        return empty(NOTHING)
    shown = {key: _shown(tables, key)[0] for key in keys}
    scale = Normalize(0, max(1, *(rows["layer"].max() for rows in shown.values())))
    figure, axes = grid(len(keys), height=2.2, share_x=False)
    for ax, (key, rows) in zip(axes, shown.items(), strict=True):
        # All of a layer's loads add up to the experts that a token meets, whichever they are.
        ax.axvline(rows["load"].sum() / len(rows), color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
        sns.scatterplot(
            rows[rows["load"] > 0], x="load", y="sparsity", hue="layer", hue_norm=scale, ax=ax,
            palette=COLORS, s=12, edgecolor=GREY, linewidth=0.3, legend=False, rasterized=True,
        )  # fmt: skip
        ax.set(xlabel="", ylabel="", xscale="log")
        ax.set_title(_title(key, rows))
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        percent_axis(ax.yaxis)
    bar = figure.colorbar(
        ScalarMappable(scale, COLORS), ax=axes, shrink=0.5, aspect=30, pad=0.01,
        ticks=MaxNLocator(5, integer=True, min_n_ticks=1),
    )  # fmt: skip
    bar.set_label("layer")
    bar.outline.set_visible(False)
    legend(figure, {}, rule("an equal share for each expert"))
    label(figure, "load: tokens that were routed to the expert (%)", "induced sparsity (%)", note)
    return figure


def _panels(tables: Tables) -> list[tuple[str, ...]]:
    """Model, criterion, site and tensor of all that was counted by expert at a level."""
    rows = tables.experts[tables.experts["level"] != DENSE]
    found = list(rows[_KEY].drop_duplicates().itertuples(index=False, name=None))
    criteria, sizes = tables.criteria(), tables.by_size()
    return sorted(
        found,
        key=lambda key: (
            *(criteria.index(key[1]), sizes.index(key[0])),
            *(site_rank(key[2]), tensor_rank(key[3])),
        ),
    )


def _of(rows: pd.DataFrame, key: tuple[str, ...]) -> pd.DataFrame:
    """The rows of a criterion, site and tensor."""
    chosen = [rows[name] == value for name, value in zip(_KEY[1:], key[1:], strict=True)]
    return rows[chosen[0] & chosen[1] & chosen[2]]


def _shown(tables: Tables, key: tuple[str, ...]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """A panel's experts at one level, and the layers of dense models of its kind at the same.

    Where dense models were measured there at some levels, it is one of these.
    """
    rows = _of(tables.experts, key)
    rows = rows[(rows["model"] == key[0]) & (rows["level"] != DENSE)]
    # Of dense models a site has no parts to be confined to.
    layers = _of(tables.layers, (*key[:2], plain(key[2]), key[3]))
    # What a pass over masks drops is not what one over text does.
    kinds = tables.models.set_index("model")["kind"]
    beside = set(kinds.index[kinds == kinds.get(key[0])]) - set(tables.experts["model"])
    layers = layers[layers["model"].isin(beside)]
    levels = rows.groupby("level", sort=False)["sparsity"].mean().dropna()
    common = levels[levels.index.isin(layers["level"])]
    levels = levels if common.empty else common
    level = (levels - MIDDLE).abs().idxmin() if len(levels) else rows["level"].iloc[0]
    dense = {
        str(model): own.sort_values("layer")
        for model, own in layers[layers["level"] == level].groupby("model", sort=False)
    }
    return rows[rows["level"] == level], dense


def _title(key: tuple[str, ...], rows: pd.DataFrame) -> str:
    model, criterion, site, tensor = key
    return f"{heading(model)}\n{at_level(site, tensor, criterion, rows['level'].iloc[0])}"
