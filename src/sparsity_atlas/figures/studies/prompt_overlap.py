"""What a prompt's mask shares with the masks of later tokens, and what it costs them."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparsity_atlas.figures.panels import empty, grid, label, legend, percent_axis, rule, select
from sparsity_atlas.figures.style import GREY, Dashes, Mark, heading, marks
from sparsity_atlas.studies.prompt_table import ADDED, OVERLAP, OVERLAP_ANOTHER, SPARSITY
from sparsity_atlas.tables.read import Tables, in_order

NOTHING = "No masks of prompts were asked for (studies.prompt_reuse)."
PANELS = 12
MIDDLE = 0.5  # of the sparsity that is shown
DASHES: dict[str, Dashes] = {OVERLAP: "-", OVERLAP_ANOTHER: "--"}
CHANCE: Dashes = (0, (1, 1.5))
WAYS: dict[str, Dashes] = {"prompt": "-", "own": "--", "another": (0, (1, 1.5))}
NAMES = {"prompt": "the prompt's mask", "own": "each token's own", "another": "another prompt's"}
_KEY = ["criterion", "model", "continuation"]


def overlap(tables: Tables) -> Figure:
    """Shares of later tokens' own neurons over the distance, means over the layers."""

    def line(ax: Axes, rows: pd.DataFrame, mark: Mark) -> None:
        for quantity, dashes in DASHES.items():
            by = rows[(rows["quantity"] == quantity) & ~rows["total"]].groupby("nearest")["value"]
            shares = by.agg(["mean", "min", "max"])
            if quantity == OVERLAP:
                ax.fill_between(
                    shares.index, shares["min"], shares["max"], color=mark.color, alpha=0.12, lw=0
                )
            ax.plot(shares["mean"], color=mark.color, marker=mark.marker, linestyle=dashes)
        _chance(ax, rows[~rows["total"]], "nearest", mark)

    figure, axes, note = _draw(tables, line, _of_masks())
    _doubling(axes)
    for ax in axes:
        percent_axis(ax.yaxis)
    return _labelled(figure, axes, "tokens behind the prompt", "shared neurons (%)", note)


def by_layer(tables: Tables) -> Figure:
    """The same over the layers, all distances together."""

    def line(ax: Axes, rows: pd.DataFrame, mark: Mark) -> None:
        for quantity, dashes in DASHES.items():
            own = rows[(rows["quantity"] == quantity) & rows["total"]].sort_values("layer")
            ax.fill_between(
                own["layer"], own["low"], own["high"], color=mark.color, alpha=0.15, lw=0
            )
            ax.plot(
                own["layer"], own["value"], color=mark.color, marker=mark.marker, linestyle=dashes
            )
        _chance(ax, rows[rows["total"]], "layer", mark)

    figure, axes, note = _draw(tables, line, _of_masks())
    for ax in axes:
        percent_axis(ax.yaxis)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _labelled(figure, axes, "layer", "shared neurons (%)", note)


def losses(tables: Tables) -> Figure:
    """What three kinds of masks add to the loss, over the distance."""

    def line(ax: Axes, rows: pd.DataFrame, mark: Mark) -> None:
        for name, dashes in WAYS.items():
            own = rows[(rows["quantity"] == ADDED[name]) & ~rows["total"]].sort_values("nearest")
            if name == "prompt":
                ax.fill_between(
                    own["nearest"], own["low"], own["high"], color=mark.color, alpha=0.15, lw=0
                )
            ax.plot(
                own["nearest"], own["value"], color=mark.color, marker=mark.marker, linestyle=dashes
            )

    kinds = [
        Line2D([], [], color=GREY, linestyle=dashes, label=NAMES[name])
        for name, dashes in WAYS.items()
    ]
    figure, axes, note = _draw(tables, line, kinds)
    _doubling(axes)
    for ax in axes:
        ax.axhline(0, color=GREY, linewidth=0.6)
    return _labelled(figure, axes, "tokens behind the prompt", "added loss (nats a token)", note)


def _of_masks() -> list[Line2D]:
    names = {OVERLAP: "with its own prompt's mask", OVERLAP_ANOTHER: "with another prompt's"}
    kinds = [
        Line2D([], [], color=GREY, linestyle=dashes, label=names[quantity])
        for quantity, dashes in DASHES.items()
    ]
    return [*kinds, rule("chance", CHANCE)]


def _chance(ax: Axes, rows: pd.DataFrame, by: str, mark: Mark) -> None:
    own = rows[rows["quantity"] == OVERLAP].groupby(by)["chance"].mean()
    ax.plot(own, color=mark.color, linewidth=0.8, linestyle=CHANCE)


def _doubling(axes: list[Axes]) -> None:
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw(
    tables: Tables, line: Callable[[Axes, pd.DataFrame, Mark], None], kinds: list[Line2D]
) -> tuple[Figure, list[Axes], str]:
    rows = tables.prompt_reuse
    if rows.empty:
        return empty(NOTHING), [], ""
    rows = rows.merge(_levels_shown(rows))
    rows = rows.assign(total=(rows["nearest"] == 1) & (rows["farthest"] > 1))
    criteria, sizes = tables.criteria(), tables.by_size()
    found = list(rows[_KEY].drop_duplicates().itertuples(index=False, name=None))
    found.sort(key=lambda key: (criteria.index(key[0]), sizes.index(key[1]), key[2] != "given"))
    keys, note = select(found, PANELS)
    styles = marks(in_order(rows["site"]))
    figure, axes = grid(len(keys), height=2.2, share_x=False)
    for ax, key in zip(axes, keys, strict=True):
        panel = rows[(rows[_KEY] == list(key)).all(axis=1)]
        for site, mark in styles.items():
            if (own := panel[panel["site"] == site]).size:
                line(ax, own, mark)
        criterion, model, continuation = key
        levels = ", ".join(dict.fromkeys(panel["level"]))
        ax.set_title(f"{heading(model)}\n{criterion} {levels}, {continuation}")
    legend(figure, styles, *kinds)
    return figure, axes, note


def _levels_shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each criterion, model and site the level that drops nearest to MIDDLE behind the prompt."""
    names = ["criterion", "model", "site", "level"]
    # What the given text shows serves both, so that they compare.
    first = rows.groupby(names[:3], sort=False)["continuation"].transform("first")
    own = rows[(rows["quantity"] == SPARSITY) & (rows["continuation"] == first)]
    means = own.groupby(names, sort=False)["value"].mean().reset_index()
    distance = (means["value"] - MIDDLE).abs()
    nearest = distance.groupby([means[name] for name in names[:3]]).idxmin()
    return means.loc[nearest, names]


def _labelled(figure: Figure, axes: list[Axes], x: str, y: str, note: str) -> Figure:
    if axes:
        label(figure, x, y, note)
    return figure
