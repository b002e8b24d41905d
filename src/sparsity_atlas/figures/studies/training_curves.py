"""Activation ratios over training tokens with the laws that they follow, and the laws' limits over size."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sparsity_atlas.figures.panels import (
    empty,
    grid,
    label,
    legend,
    percent_axis,
    select,
    size_text,
)
from sparsity_atlas.figures.style import GREY, Mark, heading, marks, wrap
from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, in_order, records
from sparsity_atlas.tables.sparsing_law import PUBLISHED_FITS
from sparsity_atlas.tables.training import SIZE, WIDTH_BY_DEPTH
from sparsity_atlas.terms import AVERAGE

PANELS, BARS = 6, 5
# Of a line below a panel, by the columns of panels.
CHARACTERS = {1: 60, 2: 44, 3: 38}
PANEL = ["series", "criterion", "site"]
NOTHING = "No model of this run is one of several checkpoints of a training."
AXES = {SIZE: "non-embedding parameters", WIDTH_BY_DEPTH: "width by depth"}


def training(tables: Tables) -> Figure:
    """Activation ratio over training tokens: a panel a training, criterion and site, a colour a bar."""
    task = tables.loss_task() or AVERAGE
    rows = tables.training[tables.training["task"] == task]
    fits = tables.training_fits[tables.training_fits["task"] == task]
    if rows.empty:
        return empty(NOTHING)
    keys, note = select(
        list(rows[PANEL].drop_duplicates().itertuples(index=False, name=None)), PANELS
    )
    bars, left = select(list(rows["bar"].drop_duplicates()), BARS)
    labels = rows.drop_duplicates("bar").set_index("bar")["bar_label"]
    styles = marks([str(labels[bar]) for bar in bars])
    figure, axes = grid(
        len(keys), height=2.5, columns=min(len(keys), 3), share_x=False, share_y=False
    )
    columns = min(len(keys), 3)
    for ax, key in zip(axes, keys, strict=True):
        own = rows[(rows[PANEL] == list(key)).all(axis=1)]
        laws = fits[(fits[PANEL] == list(key)).all(axis=1)]
        ax.set_title(heading(*key, width=84 // columns))
        _panel(ax, own, laws, styles)
        at = laws[laws["bar"] == HEADLINE_BAR]
        ax.set_xlabel(wrap(_words(at), CHARACTERS[columns]), fontsize=6.2, color=GREY)
    legend(figure, styles)
    label(
        figure,
        "training tokens",
        "activation ratio (%)",
        note="\n".join(filter(None, (note, left))),
    )
    return figure


def shown_law(fits: pd.DataFrame) -> str:
    """The law that is drawn of one bar: the activation's own, else the other if it has a limit; or none."""
    ranked = fits.sort_values("of_activation", ascending=False, kind="stable")
    for row in records(ranked):
        # A fit at an end of its law has a reason, and one that has too few points has no limit.
        if row.resolved or (row.of_activation and pd.notna(row.limit)):
            return str(row.law)
    return ""


def _panel(ax: Axes, rows: pd.DataFrame, fits: pd.DataFrame, styles: dict[str, Mark]) -> None:
    ax.set_xscale("log")
    middle = (len(styles) - 1) / 2
    for place, (bar, mark) in enumerate(styles.items()):
        own = rows[rows["bar_label"] == bar]
        points = own[own["law"] == ""]
        # Bars side by side, so that their intervals do not hide each other.
        x = points["training_tokens"] * 1.03 ** (place - middle)
        ax.vlines(x, points["ratio_low"], points["ratio_high"], color=mark.color, linewidth=1)
        ax.plot(x, points["ratio"], color=mark.color, marker=mark.marker, linestyle="none")
        for row, at in zip(records(points), x, strict=True):
            if row.relation != "=":
                ax.annotate(
                    {"<=": "≤", ">": ">"}[row.relation], (at, row.ratio), (-3, 0), ha="right",
                    va="center", fontsize=7, color=mark.color, textcoords="offset points",
                )  # fmt: skip
        line = own[(own["law"] != "") & (own["law"] == shown_law(fits[fits["bar_label"] == bar]))]
        ax.plot(line["training_tokens"], line["ratio"], color=mark.color, linestyle=mark.dashes)
        if len(points) and points["bar"].iloc[0] == HEADLINE_BAR:
            ax.fill_between(
                line["training_tokens"], line["ratio_low"].astype(float),
                line["ratio_high"].astype(float), color=mark.color, alpha=0.15, linewidth=0,
            )  # fmt: skip
    _log_axis(ax, rows["training_tokens"])
    # A band that knows nothing would hide the points.
    points = rows[rows["law"] == ""]
    low = points[["ratio", "ratio_low"]].min().min()
    high = points[["ratio", "ratio_high"]].max().max()
    room = 0.25 * max(high - low, 0.02)
    ax.set_ylim(max(low - room, 0), min(high + room, 1))
    percent_axis(ax.yaxis)


def _log_axis(ax: Axes, values: pd.Series) -> None:
    wide = values.max() > 30 * values.min()
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=6))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))


def _words(fits: pd.DataFrame) -> str:
    """What the laws say at the headline bar."""
    said = []
    for row in records(fits):
        if not row.resolved:
            said.append(f"{row.law}: {row.reason}")
            continue
        low, high = in_percent(row.limit_low, row.limit_high, 1)
        said.append(f"{row.law}: limit {100 * row.limit:.1f} % [{low}, {high}]")
    return "; ".join(said)


def limits(tables: Tables) -> Figure:
    """Limits of the activation ratio over size and over width by depth, beside those of Sparsing Law."""
    task = tables.loss_task() or AVERAGE
    rows = tables.training_fits
    rows = rows[(rows["task"] == task) & (rows["bar"] == HEADLINE_BAR) & rows["of_activation"]]
    told = rows[rows["resolved"]]
    if rows.empty:
        return empty(NOTHING)
    if told.empty:
        return empty(
            "No training of this run has a limit that can be told: training_fits.csv says why."
        )
    sites = marks(in_order(told["site"]))
    criteria, note = select(list(told["criterion"].drop_duplicates()), PANELS // 2)
    figure, axes = grid(2 * len(criteria), height=2.5, columns=2, share_x=False)
    for place, criterion in enumerate(criteria):
        for ax, (over, name) in zip(axes[2 * place :], AXES.items(), strict=False):
            panel = told[told["criterion"] == criterion]
            ax.set_xscale("log")
            if over == SIZE:
                for one in PUBLISHED_FITS:
                    ax.plot(
                        one.billions * 1e9, one.limit, color="0.6", markerfacecolor="white",
                        marker="o" if one.activation == "relu" else "s", linestyle="none",
                    )  # fmt: skip
            for site, mark in sites.items():
                own = panel[panel["site"] == site]
                ax.vlines(own[over], own["limit_low"], own["limit_high"], color=mark.color)
                ax.plot(
                    own[over], own["limit"], color=mark.color, marker=mark.marker, linestyle="none"
                )
            ax.set_title(heading(criterion, width=40))
            ax.set_xlabel(wrap(f"{name}{_slopes(tables, criterion, over, task)}", 58))
            every = panel[over] if over != SIZE else pd.concat([panel[over], _sizes()])
            _log_axis(ax, every)
            percent_axis(ax.yaxis)
    printed = [
        Line2D(
            [], [], color="0.6", markerfacecolor="white", marker=marker, linestyle="none",
            label=f"Sparsing Law, {name}",
        )
        for name, marker in (("ReLU", "o"), ("SiLU", "s"))
    ]  # fmt: skip
    legend(figure, sites, *printed)
    untold = len(rows) - len(told)
    more = f"{untold} without a limit that can be told" if untold else ""
    label(figure, "", "limit of the activation ratio (%)", "\n".join(filter(None, (note, more))))
    return figure


def _slopes(tables: Tables, criterion: str, over: str, task: str) -> str:
    """Resolved slopes of the limits, in points per tenfold."""
    rows = tables.training_limits
    own = rows[
        (rows["criterion"] == criterion)
        & (rows["over"] == over)
        & (rows["task"] == task)
        & (rows["bar"] == HEADLINE_BAR)
        & rows["resolved"]
    ]
    said = []
    for row in records(own):
        low, high = in_percent(row.low, row.high, 1)
        said.append(f"{row.family}, {row.site}: {100 * row.slope:+.1f} [{low}, {high}] a tenfold")
    return "".join(f"; {one}" for one in said)


def _sizes() -> pd.Series:
    return pd.Series([one.billions * 1e9 for one in PUBLISHED_FITS])
