"""Local intrinsic dimension of each layer's activations."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparsity_atlas.figures.panels import empty, grid, label, legend, select, with_parts
from sparsity_atlas.figures.style import GREY, Dashes, heading, marks
from sparsity_atlas.tables.read import Tables, in_order

PANELS = 12
KINDS: dict[str, tuple[Dashes, str]] = {
    "lid": ("-", "maximum likelihood"),
    "lid_geomle": (":", "GeoMLE"),
}


def local_dimension(tables: Tables) -> Figure:
    """Both estimates over the layers; of experts the mean of those that have one."""
    rows = with_parts(tables.metrics.dropna(subset="lid"))
    if rows.empty:
        return empty("No local dimension was asked for (studies.lid).")
    sizes = tables.by_size()
    found = list(rows[["model", "part"]].drop_duplicates().itertuples(index=False, name=None))
    keys, note = select(sorted(found, key=lambda key: (sizes.index(key[0]), key[1])), PANELS)
    styles = marks(in_order(rows["tensor"]))
    figure, axes = grid(len(keys), share_x=False)
    for ax, (model, part) in zip(axes, keys, strict=True):
        panel = rows[(rows["model"] == model) & (rows["part"] == part)]
        for tensor, mark in styles.items():
            own = panel[panel["tensor"] == tensor].groupby("layer")
            for column, (dashes, _) in KINDS.items():
                line = own[column].mean()
                ax.plot(line.index, line, color=mark.color, marker=mark.marker, linestyle=dashes)
        ax.set_title(heading(*filter(None, (model, part))))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0].set_ylim(bottom=0)
    kinds = [
        Line2D([], [], color=GREY, linestyle=dashes, label=name) for dashes, name in KINDS.values()
    ]
    legend(figure, styles, *kinds)
    label(figure, "layer", "local intrinsic dimension", note)
    return figure
