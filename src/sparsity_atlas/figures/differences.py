"""Criteria at equal induced sparsity: differences from a reference, and FFN-output errors."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparsity_atlas.figures.panels import (
    empty,
    grid,
    label,
    legend,
    of_nats,
    percent_axis,
    rule,
    select,
)
from sparsity_atlas.figures.score_curves import ALLOWED_LOSS, PANELS
from sparsity_atlas.figures.style import GREY, Mark, heading, marks
from sparsity_atlas.tables.read import Tables, site_rank
from sparsity_atlas.terms import AVERAGE

NOTHING = "One criterion a model and site in this run: nothing to compare."
X_LABEL = "induced sparsity (%)"


def differences(tables: Tables) -> Figure:
    """Each criterion's score minus the reference's, one panel a model and site.

    Where each map has a mask of its own, another panel has each criterion minus itself with one for all.
    """
    task = tables.loss_task() or AVERAGE
    rows = tables.comparison
    rows = rows[(rows["task"] == task) & rows["difference"].notna()]
    itself = rows["criterion"] == rows["reference"]
    rows = rows[itself.where(_beside(rows), rows["sparsity_of"] == "entries")]
    keys, note = _keys(tables, rows)
    if not keys:
        return empty(NOTHING)
    nats = of_nats(rows)
    styles = marks(tables.criteria())
    figure, axes = grid(len(keys), height=2.0)
    for ax, key in zip(axes, keys, strict=True):
        model, site, beside = key
        panel = _panel(rows, key)
        reference = panel["reference"].iloc[0] if site == beside else beside
        ax.set_title(heading(model, site, f"− {reference}"))
        ax.axhline(0, color=GREY, linewidth=0.8)
        for name, line in _lines(panel):
            if site == beside and name == reference:
                continue
            mark = styles[name]
            x = line["sparsity"]
            low, high = line["difference_low"], line["difference_high"]
            ax.fill_between(x, low, high, color=mark.color, alpha=0.15, linewidth=0)
            ax.plot(
                x, line["difference"], color=mark.color, marker=mark.marker, linestyle=mark.dashes
            )
        percent_axis(ax.xaxis)
        if nats:
            ax.set_yscale("symlog", linthresh=ALLOWED_LOSS, linscale=0.8)
            ax.yaxis.set_major_locator(FixedLocator([-1, -0.1, -0.01, 0, 0.01, 0.1, 1]))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            percent_axis(ax.yaxis)
    legend(figure, _drawn(styles, rows), rule("the reference", "-"))
    y_label = (
        f"added {nats} minus the reference's (nats)"
        if nats
        else "retained accuracy, difference (%)"
    )
    label(figure, X_LABEL, y_label, note)
    return figure


def output_errors(tables: Tables) -> Figure:
    """FFN-output error of each criterion at equal sparsity, one panel a model and site."""
    rows = tables.comparison
    rows = rows[rows["output_error"].notna()]
    rows = rows.drop_duplicates(["model", "site", "criterion", "sparsity"])
    keys, note = _keys(tables, rows)
    if not keys:
        return empty(NOTHING)
    styles = marks(tables.criteria())
    figure, axes = grid(len(keys), height=2.0)
    for ax, key in zip(axes, keys, strict=True):
        panel = _panel(rows, key)
        ax.set_title(heading(*key[:2]))
        for name, line in _lines(panel):
            mark = styles[name]
            ax.plot(
                line["sparsity"],
                line["output_error"],
                color=mark.color,
                marker=mark.marker,
                linestyle=mark.dashes,
            )
        percent_axis(ax.xaxis)
        percent_axis(ax.yaxis)
    legend(figure, _drawn(styles, rows))
    label(figure, "induced sparsity (%), captured text", "relative FFN-output error (%)", note)
    return figure


# Model, site, and the site of the curve that differences are taken from.
_Key = tuple[str, str, str]
_KEY = ["model", "site", "reference_site"]


def _beside(rows: pd.DataFrame) -> pd.Series[bool]:
    """Whether differences are from another site: that where one mask serves all maps."""
    return rows["reference_site"] != rows["site"]


def _keys(tables: Tables, rows: pd.DataFrame) -> tuple[list[_Key], str]:
    """What has a panel: several criteria, or one beside itself at another site; the smallest model first."""
    criteria: dict[_Key, set[str]] = {}
    for *key, criterion in rows[[*_KEY, "criterion"]].itertuples(index=False, name=None):
        model, site, beside = key
        criteria.setdefault((model, site, beside), set()).add(criterion)
    found = [key for key, names in criteria.items() if len(names) > 1 or key[1] != key[2]]
    sizes = tables.by_size()
    found.sort(key=lambda key: (sizes.index(key[0]), site_rank(key[1]), key[1] != key[2]))
    return select(found, PANELS)


def _panel(rows: pd.DataFrame, key: _Key) -> pd.DataFrame:
    return rows[(rows[_KEY] == [*key]).all(axis=1)]


def _drawn(styles: dict[str, Mark], rows: pd.DataFrame) -> dict[str, Mark]:
    """The marks of what is drawn: a legend of all criteria may be longer than that."""
    there = set(rows["criterion"])
    return {name: mark for name, mark in styles.items() if name in there}


def _lines(panel: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each criterion, in the run's order, by sparsity."""
    return [
        (str(name), line.sort_values("sparsity"))
        for name, line in panel.groupby("criterion", sort=False)
    ]
