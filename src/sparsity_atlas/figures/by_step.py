"""Step by step: what masks keep while a masked-diffusion model fills an answer in, and how far they drift."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparsity_atlas.figures.by_layer import COLORS, TICKS
from sparsity_atlas.figures.panels import at_level, empty, grid, label, legend, percent_axis, select
from sparsity_atlas.figures.style import GREY, Dashes, Mark, heading, marks
from sparsity_atlas.tables.read import Tables, site_rank, tensor_rank

NOTHING = "No generation of a masked-diffusion model in this run."
PANELS = 12
# Of all levels the one at which the answers' sparsity is nearest to this is shown.
MIDDLE = 0.5
REGIONS = ("prompt", "masked", "new", "filled")
NAMES = ("prompt", "masked", "just filled in", "filled in")
DASHES: dict[str, Dashes] = {"previous": "-", "first": "--"}
_KEY = ["model", "criterion", "site", "tensor", "task"]


def sparsity(tables: Tables) -> Figure:
    """Induced sparsity over the steps: of the prompt, and of the answer's tokens by where they are."""
    shown, note = _panels(tables)
    if not shown:
        return empty(NOTHING)
    styles = _styles()
    figure, axes = grid(len(shown), height=2.2, share_x=False)
    for ax, (key, rows) in zip(axes, shown.items(), strict=True):
        for region, mark in zip(REGIONS, styles.values(), strict=True):
            _line(ax, rows[rows["region"] == region], "sparsity", mark)
        _finish(ax, key, rows)
    legend(figure, styles)
    label(figure, "step", "induced sparsity (%)", note)
    return figure


def overlap(tables: Tables) -> Figure:
    """The masks' overlap with those of the step before, and with those of the first step."""
    shown, note = _panels(tables)
    if not shown:
        return empty(NOTHING)
    styles = marks(("prompt", "answer"))
    figure, axes = grid(len(shown), height=2.2, share_x=False)
    for ax, (key, rows) in zip(axes, shown.items(), strict=True):
        for region, mark in styles.items():
            own = rows[rows["region"] == region]
            for other, dashes in DASHES.items():
                _line(ax, own, f"{other}_overlap", Mark(mark.color, mark.marker, dashes))
        _finish(ax, key, rows)
    names = {"previous": "with the step before", "first": "with step 0"}
    entries = [
        *(
            Line2D([], [], color=m.color, marker=m.marker, linestyle="", label=name)
            for name, m in styles.items()
        ),
        *(
            Line2D([], [], color=GREY, linestyle=dashes, label=names[other])
            for other, dashes in DASHES.items()
        ),
    ]
    legend(figure, {}, *entries)
    label(figure, "step", "Jaccard overlap of masks (%)", note)
    return figure


def by_layer(tables: Tables) -> Figure:
    """The overlap of the answer's masks with those of the first step, layer by step."""
    shown, note = _panels(tables)
    if not shown:
        return empty(NOTHING)
    figure, axes = grid(len(shown), height=2.2, share_x=False, share_y=False)
    for ax, (key, rows) in zip(axes, shown.items(), strict=True):
        own = rows[(rows["region"] == "answer") & (rows["step"] > 0)]
        table = 100 * own.pivot_table(index="layer", columns="step", values="first_overlap")
        sns.heatmap(table, ax=ax, cmap=COLORS, vmin=0, vmax=100, cbar=False)
        ax.invert_yaxis()
        ax.set(xlabel="", ylabel="")
        for names, place in ((table.columns, ax.set_xticks), (table.index, ax.set_yticks)):
            every = max(1, -(-len(names) // TICKS))
            some = [f"{name:.0f}" for name in names[::every]]
            place(np.arange(0, len(names), every) + 0.5, some, rotation=0)
        ax.tick_params(length=1.5, labelsize=6)
        ax.grid(visible=False)
        ax.set_title(_title(key, rows))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 100), COLORS), ax=axes, shrink=0.5, aspect=30, pad=0.01
    )
    bar.set_label("Jaccard overlap with step 0 (%)")
    bar.outline.set_visible(False)
    label(figure, "step", "layer", note)
    return figure


def _styles() -> dict[str, Mark]:
    return dict(zip(NAMES, marks(REGIONS).values(), strict=True))


def _panels(tables: Tables) -> tuple[dict[tuple[str, ...], pd.DataFrame], str]:
    """Steps at one level, by model, criterion, site, tensor and task, and what is said of those left out."""
    rows = tables.steps.dropna(subset="step")
    found = list(rows[_KEY].drop_duplicates().itertuples(index=False, name=None))
    criteria, sizes = tables.criteria(), tables.by_size()
    found.sort(
        key=lambda key: (
            *(criteria.index(key[1]), sizes.index(key[0])),
            *(site_rank(key[2]), tensor_rank(key[3])),
        )
    )
    keys, note = select(found, PANELS)
    groups = rows.groupby(_KEY, sort=False)
    return {key: _at_one_level(groups.get_group(key)) for key in keys}, note


def _at_one_level(rows: pd.DataFrame) -> pd.DataFrame:
    answer = rows[rows["region"] == "answer"]
    levels = answer.groupby("level", sort=False)["sparsity"].mean()
    return rows[rows["level"] == (levels - MIDDLE).abs().idxmin()]


def _line(ax: Axes, rows: pd.DataFrame, column: str, mark: Mark) -> None:
    """A share over the steps: mean over the layers, and what lies between them."""
    layers = rows.dropna(subset=column).groupby("step")[column]
    mean, low, high = layers.mean(), layers.min(), layers.max()
    ax.fill_between(mean.index, low, high, color=mark.color, alpha=0.15, linewidth=0)
    every = max(1, len(mean) // 8)
    ax.plot(
        *(mean.index, mean), color=mark.color, linestyle=mark.dashes,
        marker=mark.marker, markevery=every,
    )  # fmt: skip


def _finish(ax: Axes, key: tuple[str, ...], rows: pd.DataFrame) -> None:
    ax.set_title(_title(key, rows))
    ax.set_ylim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    percent_axis(ax.yaxis)


def _title(key: tuple[str, ...], rows: pd.DataFrame) -> str:
    model, criterion, site, tensor, task = key
    return f"{heading(model, task)}\n{at_level(site, tensor, criterion, rows['level'].iloc[0])}"
