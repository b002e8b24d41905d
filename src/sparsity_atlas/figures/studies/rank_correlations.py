"""Which cheap number foretells how much can be dropped: rank correlations with their intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_atlas.figures.panels import empty, grid, label, legend, select
from sparsity_atlas.figures.style import GREY, Mark, marks
from sparsity_atlas.tables.foretelling import CHEAP, EVERY
from sparsity_atlas.tables.read import Tables, in_order, records

PANELS = 6
NAMES = {"ppl_sparsity": "PPL-1% sparsity", "critical_sparsity": "critical sparsity"}
ALL_SITES = "all sites"
# Of a metric's line, between its sites.
SPREAD = 0.6


def foretelling(tables: Tables) -> Figure:
    """Correlation of each cheap number, by criterion, measure and site."""
    rows = tables.foretelling.dropna(subset="correlation")
    if rows.empty:
        return empty("Fewer than five models with a crossing at a site.")
    found = list(
        rows[["criterion", "measure"]].drop_duplicates().itertuples(index=False, name=None)
    )
    keys, note = select(found, PANELS)
    styles = {**marks(in_order(rows["site"])), EVERY: Mark((0.2, 0.2, 0.2), "P", "-")}
    styles = {site: mark for site, mark in styles.items() if (rows["site"] == site).any()}
    metrics = [name for name in CHEAP if (rows["metric"] == name).any()]
    figure, axes = grid(len(keys), height=0.6 + 0.2 * len(metrics), columns=2)
    for ax, (criterion, measure) in zip(axes, keys, strict=True):
        panel = rows[(rows["criterion"] == criterion) & (rows["measure"] == measure)]
        for offset, (site, mark) in zip(_offsets(len(styles)), styles.items(), strict=True):
            _points(ax, panel[panel["site"] == site], metrics, mark, offset)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_title(f"{criterion}: {NAMES[measure]}")
        ax.set_yticks(range(len(metrics)), [name.replace("_", " ") for name in metrics])
        ax.set_ylim(len(metrics) - 0.4, -0.6)
        ax.set_xlim(-1.05, 1.05)
    legend(figure, {ALL_SITES if site == EVERY else site: mark for site, mark in styles.items()})
    label(figure, "Spearman rank correlation over the models", note=note)
    return figure


def _offsets(count: int) -> list[float]:
    offsets: list[float] = np.linspace(-SPREAD / 2, SPREAD / 2, count).tolist()
    return offsets if count > 1 else [0.0]


def _points(ax: Axes, rows: pd.DataFrame, metrics: list[str], mark: Mark, offset: float) -> None:
    for row in records(rows):
        y = metrics.index(row.metric) + offset
        ax.plot([row.low, row.high], [y, y], color=mark.color, linewidth=0.8)
        ax.plot(
            *(row.correlation, y), color=mark.color, marker=mark.marker, linestyle="",
            markerfacecolor=mark.color if row.resolved else "white",
        )  # fmt: skip
