"""Sparsity by layer of several criteria that drop as much on the average."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsity_atlas.figures.panels import empty, grid, label, legend, percent_axis, select
from sparsity_atlas.figures.style import heading, marks
from sparsity_atlas.tables.read import Tables, in_order

PANELS = 12
MIDDLE = 0.5
_KEY = ["model", "site", "tensor"]


def layer_profile(tables: Tables) -> Figure:
    """A panel for each model, site and tensor that several criteria sparsify, a line for each of them."""
    rows = tables.layer_profile
    counts = rows.groupby([*_KEY, "mean_sparsity"], sort=False)["criterion"].nunique()
    counts = counts[counts > 1]
    if counts.empty:
        return empty("Nowhere do two criteria drop as much.")
    # The mean that most of them reach, and of several such the one nearest to one half.
    ranked = counts.reset_index()
    ranked["distance"] = (ranked["mean_sparsity"] - MIDDLE).abs()
    ranked = ranked.sort_values(["criterion", "distance"], ascending=[False, True], kind="stable")
    nearest = ranked.drop_duplicates(_KEY)
    means: dict[tuple[str, ...], float] = {
        tuple(key): mean
        for *key, mean in nearest[[*_KEY, "mean_sparsity"]].itertuples(index=False, name=None)
    }
    sizes, sites = tables.by_size(), in_order(rows["site"])
    keys, note = select(
        sorted(means, key=lambda key: (sizes.index(key[0]), sites.index(key[1]), key[2])), PANELS
    )
    styles = marks([one for one in tables.criteria() if one in set(rows["criterion"])])
    drawn = set()
    figure, axes = grid(len(keys), height=2.2, share_x=False)
    for ax, key in zip(axes, keys, strict=True):
        own = rows[(rows[_KEY] == list(key)).all(axis=1) & (rows["mean_sparsity"] == means[key])]
        for criterion, mark in styles.items():
            line = own[own["criterion"] == criterion].sort_values("layer")
            if line.empty:
                continue
            drawn.add(criterion)
            ax.plot(
                *(line["layer"], line["sparsity"]), color=mark.color, marker=mark.marker,
                linestyle=mark.dashes,
            )  # fmt: skip
        model, site, tensor = key
        where = site if site == tensor else f"{site}: {tensor}"
        ax.set_title(f"{heading(model)}\n{where}, {means[key]:.0%} on the average")
        ax.set_ylim(-0.02, 1.04)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent_axis(ax.yaxis)
    legend(figure, {name: mark for name, mark in styles.items() if name in drawn})
    label(figure, "layer", "induced sparsity (%)", note)
    return figure
