"""How well local dimension, by layer, and other numbers of an answer tell right ones from wrong ones."""

from __future__ import annotations

from collections.abc import Collection
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparsity_atlas.figures.panels import empty, grid, label, legend, percent_axis, select
from sparsity_atlas.figures.style import GREY, Dashes, Mark, heading, marks
from sparsity_atlas.tables.read import Tables, records

PANELS = 12
KINDS: dict[str, tuple[Dashes, str]] = {
    "lid": ("-", "maximum likelihood"),
    "lid_geomle": (":", "GeoMLE"),
}
# By name of the predictor: those that a sample has one of.
BESIDE = {"logprob": "log-probability", "margin": "margin", "sparsity": "induced sparsity"}
BLACK = (0.2, 0.2, 0.2)
MARKERS = ("P", "X", "*", "D", "^", "v", "<", ">", "h", "8")


def truthfulness(tables: Tables) -> Figure:
    """AUROC over the layers of each model and task, and beside them what has no layer."""
    rows = tables.truthfulness.dropna(subset="auroc")
    if rows.empty:
        said = tables.truthfulness["reason"].unique()
        return empty(said[0] if len(said) else "No answers were studied (studies.truthfulness).")
    sizes = tables.by_size()
    found = list(rows[["model", "task"]].drop_duplicates().itertuples(index=False, name=None))
    keys, note = select(sorted(found, key=lambda key: sizes.index(key[0])), PANELS)
    styles = {name: mark for name, mark in marks([*_tensors(rows)]).items()}
    beside = {
        key: Mark(BLACK, marker, "-")
        for key, marker in zip(_beside(rows), cycle(MARKERS), strict=False)
    }
    figure, axes = grid(len(keys), height=2.0, share_x=False)
    for ax, (model, task) in zip(axes, keys, strict=True):
        panel = rows[(rows["model"] == model) & (rows["task"] == task)]
        _layers(ax, panel, styles)
        _without_layer(ax, panel, styles, beside)
        ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
        right, samples = int(panel["right"].iloc[0]), int(panel["samples"].iloc[0])
        ax.set_title(f"{heading(model, task)}\n{right} of {samples} right")
        percent_axis(ax.yaxis)
    kinds = [
        Line2D([], [], color=GREY, linestyle=dashes, label=name) for dashes, name in KINDS.values()
    ]
    others = [
        Line2D([], [], color=BLACK, marker=mark.marker, linestyle="", label=_name(*key, beside))
        for key, mark in beside.items()
    ]
    legend(figure, styles, *kinds, *others)
    label(
        figure,
        "layer; on the right: the layer picked on the other half of the samples, and what has no layer",
        "AUROC of right answers, %",
        note,
    )
    return figure


def _beside(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """What has no layer: predictor, and of a sparsity the node; in the order of `BESIDE`."""
    own = rows[rows["predictor"].isin([*BESIDE])]
    found = {(str(one.predictor), str(one.node)) for one in records(own)}
    return sorted(found, key=lambda key: ([*BESIDE].index(key[0]), key[1]))


def _name(predictor: str, node: str, beside: Collection[tuple[str, str]]) -> str:
    """As a legend has it: with its node where there are several, below, or it would be one column."""
    alone = sum(name == predictor for name, _ in beside) == 1
    return BESIDE[predictor] if alone else f"{BESIDE[predictor]},\n{node}"


def _tensors(rows: pd.DataFrame) -> list[str]:
    return [name for name in rows["tensor"].unique() if name]


def _layers(ax: Axes, panel: pd.DataFrame, styles: dict[str, Mark]) -> None:
    for tensor, mark in styles.items():
        for predictor, (dashes, _) in KINDS.items():
            own = panel[(panel["tensor"] == tensor) & (panel["predictor"] == predictor)]
            own = own.dropna(subset="layer").sort_values("layer")
            if own.empty:
                continue
            ax.plot(
                *(own["layer"], own["auroc"]),
                color=mark.color, marker=mark.marker, linestyle=dashes,
            )  # fmt: skip
            ax.fill_between(own["layer"], own["low"], own["high"], color=mark.color, alpha=0.1)


def _without_layer(
    ax: Axes, panel: pd.DataFrame, styles: dict[str, Mark], beside: dict[tuple[str, str], Mark]
) -> None:
    """Points with whiskers behind the last layer."""
    layers = panel["layer"].dropna()
    last = int(layers.max()) if len(layers) else 0
    step = max(last, 4) / 12
    place = last + 2 * step
    ax.axvline(last + step, color=GREY, linewidth=0.5)
    for row in records(panel[panel["layer"].isna()]):
        dimension = row.predictor in KINDS
        mark = styles[row.tensor] if dimension else beside[row.predictor, row.node]
        dashes: Dashes = KINDS[row.predictor][0] if dimension else "-"
        ends = [row.low, row.high]
        ax.plot([place, place], ends, color=mark.color, linewidth=0.8, linestyle=dashes)
        ax.plot(place, row.auroc, color=mark.color, marker=mark.marker, linestyle="")
        place += step
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= last])
    ax.set_xlim(-step, place)
