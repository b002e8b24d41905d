"""What texts before prompts do to scores, and to the gates of each layer."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparsity_atlas.figures.panels import empty, grid, label, legend, percent_axis, select
from sparsity_atlas.figures.style import GREY, heading, marks
from sparsity_atlas.tables.read import Tables, in_order
from sparsity_atlas.terms import IN_NATS

NOTHING = "No task has a text before its prompts (tasks: inserted)."
PANELS = 12
NAMES = {"near_zero": "near zero", "l1": "L1", "l2": "L2", "gini": "Gini"}


def scores(tables: Tables) -> Figure:
    """Differences of scores over induced sparsity, a panel for each model, criterion, site and unit."""
    rows = tables.inserted
    if rows.empty:
        return empty(NOTHING)
    shown = tables.curves[["model", "criterion", "site", "level", "task", "sparsity"]]
    shown = shown.rename(columns={"task": "before"})
    rows = rows.merge(shown, on=["model", "criterion", "site", "level", "before"])
    rows = rows.assign(unit=rows["kind"].isin(IN_NATS).map({True: "nats", False: "%"}))
    criteria, sizes, sites = tables.criteria(), tables.by_size(), in_order(rows["site"])
    names = ["criterion", "model", "site", "unit"]
    found = list(rows[names].drop_duplicates().itertuples(index=False, name=None))
    found.sort(key=lambda k: (criteria.index(k[0]), sizes.index(k[1]), sites.index(k[2]), k[3]))
    keys, note = select(found, PANELS)
    styles = marks(list(dict.fromkeys(rows["task"])))
    figure, axes = grid(len(keys), height=2.2, share_x=False, share_y=False)
    for ax, key in zip(axes, keys, strict=True):
        panel = rows[(rows[names] == list(key)).all(axis=1)]
        for task, mark in styles.items():
            line = panel[panel["task"] == task].sort_values("sparsity")
            ax.fill_between(
                line["sparsity"], line["low"], line["high"], color=mark.color, alpha=0.15, lw=0
            )
            ax.plot(
                *(line["sparsity"], line["difference"]), color=mark.color, marker=mark.marker,
                linestyle=mark.dashes,
            )  # fmt: skip
        ax.axhline(0, color=GREY, linewidth=0.6)
        criterion, model, site, unit = key
        what = "added loss (nats)" if unit == "nats" else "accuracy (points)"
        ax.set_title("\n".join((heading(model), heading(criterion, site), what)))
        percent_axis(ax.xaxis)
        if unit != "nats":
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    legend(figure, styles)
    label(figure, "induced sparsity without it (%)", "with the text less without", note)
    return figure


def gates(tables: Tables) -> Figure:
    """Changes of the gates' numbers over the layers, as shares of what they are without the text."""
    rows = tables.inserted_gates
    if rows.empty:
        return empty(NOTHING)
    base = rows["value_before"].where(rows["value_before"] != 0)
    for name in ("difference", "low", "high"):
        rows = rows.assign(**{name: rows[name] / base})
    sizes = tables.by_size()
    found = list(
        rows[["model", "task", "part"]].drop_duplicates().itertuples(index=False, name=None)
    )
    keys, note = select(sorted(found, key=lambda key: sizes.index(key[0])), PANELS)
    styles = marks(list(NAMES.values()))
    figure, axes = grid(len(keys), height=2.2, share_x=False, share_y=False)
    for ax, (model, task, part) in zip(axes, keys, strict=True):
        panel = rows[(rows["model"] == model) & (rows["task"] == task) & (rows["part"] == part)]
        for quantity, name in NAMES.items():
            line = panel[panel["quantity"] == quantity].sort_values("layer")
            mark = styles[name]
            ax.fill_between(
                line["layer"], line["low"], line["high"], color=mark.color, alpha=0.15, lw=0
            )
            ax.plot(
                *(line["layer"], line["difference"]), color=mark.color, marker=mark.marker,
                linestyle=mark.dashes,
            )  # fmt: skip
        ax.axhline(0, color=GREY, linewidth=0.6)
        ax.set_title(f"{heading(model)}\n{task}" + ("" if part == "ffn" else f", {part}"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent_axis(ax.yaxis)
    legend(figure, styles)
    label(figure, "layer", "change of the gate (%)", note)
    return figure
