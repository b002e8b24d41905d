"""CETT over the share of entries that lie below a threshold."""

from __future__ import annotations

from matplotlib.figure import Figure

from sparsity_atlas.figures.panels import empty, grid, label, legend, percent_axis, select
from sparsity_atlas.figures.style import marks
from sparsity_atlas.studies.mask_table import CETT, CETT_SPARSITY
from sparsity_atlas.tables.read import Tables

LINES = 10


def cett(tables: Tables) -> Figure:
    """A line for each model, a point for each threshold, means over the layers."""
    columns = ["model", "criterion", "at", "value"]
    rows = (
        tables.masks[tables.masks["part"] != "shared"] if "part" in tables.masks else tables.masks
    )
    lost = rows[rows["quantity"] == CETT][columns]
    share = rows[rows["quantity"] == CETT_SPARSITY][columns]
    points = share.merge(lost, on=columns[:3], suffixes=("_share", "_lost"))
    # Every curve of a model at `intermediate` has them, and they are of no criterion.
    points = points.drop_duplicates(["model", "at"])
    if points.empty:
        return empty("No thresholds were asked for (studies.cett).")
    shown, note = select([one for one in tables.by_size() if one in set(points["model"])], LINES)
    styles = marks(shown)
    figure, (ax,) = grid(1)
    for model, mark in styles.items():
        line = points[points["model"] == model].sort_values("at")
        ax.plot(
            *(line["value_share"], line["value_lost"]), color=mark.color, marker=mark.marker,
            linestyle=mark.dashes,
        )  # fmt: skip
    percent_axis(ax.xaxis)
    percent_axis(ax.yaxis)
    legend(figure, styles)
    label(figure, "entries below the threshold (%)", "CETT (%)", note)
    return figure
