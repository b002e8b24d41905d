"""Panels of a figure: how many, where, and what each says about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparsity_atlas.figures.style import (
    GREY,
    NARROW,
    TALL,
    WIDE,
    Dashes,
    Mark,
    NothingToShow,
    wrap,
)
from sparsity_atlas.tables.read import Tables
from sparsity_atlas.terms import IN_NATS, NAMED_PARTS, plain

Key = TypeVar("Key")
# Inches that a character of a note takes, on the average.
CHARACTER = 0.062
# Inches that a figure's height has beside its panels: legend, titles, the label of the x axis.
ABOVE_AND_BELOW = 1.1
# Characters that fit above one of four panels.
LINE = 28


def select(keys: Sequence[Key], limit: int) -> tuple[list[Key], str]:
    """At most `limit` keys, evenly spread with both ends, and a line that says what is left out."""
    if len(keys) <= limit:
        return list(keys), ""
    places = np.linspace(0, len(keys) - 1, limit).round().astype(int)
    return [keys[place] for place in places], left_out(limit, len(keys))


def of_nats(rows: pd.DataFrame) -> str:
    """What is added, where the scores of some rows are nats: a loss, a bound, or either; else nothing."""
    return " or ".join(kind for kind in IN_NATS if (rows["kind"] == kind).any())


def measured_pairs(tables: Tables, rows: pd.DataFrame) -> list[tuple[str, str]]:
    """The (criterion, model) pairs of some rows, by criterion and then by size."""
    there = set(rows[["criterion", "model"]].itertuples(index=False, name=None))
    wanted = [(c, m) for c in tables.criteria() for m in tables.by_size()]
    return [pair for pair in wanted if pair in there]


def repeated(rows: pd.DataFrame, by: list[str], what: str) -> list[tuple[str, str]]:
    """The keys `by`, two columns, under which there are several of `what`, in the table's order."""
    counts = rows.groupby(by, sort=False)[what].nunique()
    keys: list[tuple[str, str]] = counts[counts > 1].index.to_list()
    return keys


def select_pairs(
    tables: Tables, rows: pd.DataFrame, limit: int
) -> tuple[list[tuple[str, str]], str]:
    """At most `limit` (criterion, model) pairs: where not all fit, those of the first criterion."""
    pairs = measured_pairs(tables, rows)
    if len(pairs) <= limit:
        return pairs, ""
    kept, _ = select([pair for pair in pairs if pair[0] == pairs[0][0]], limit)
    return kept, left_out(len(kept), len(pairs))


def left_out(shown: int, all_of_them: int) -> str:
    """What a figure says where it does not show everything."""
    return f"{shown} of {all_of_them} shown; the tables hold the others"


def with_parts(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the part of each that has a panel of its own; empty: it shares the model's."""
    part = rows["part"].where(rows["part"].isin(NAMED_PARTS), "") if "part" in rows else ""
    return rows.assign(part=part)


def of_tensor(site: str, tensor: str) -> str:
    """A site, and of several tensors which: on two lines where one is wider than a panel."""
    if plain(site) == tensor:
        return site
    return f"{site}:{' ' if len(site) + len(tensor) < LINE else chr(10)}{tensor}"


def at_level(site: str, tensor: str, criterion: str, level: str) -> str:
    """What a panel shows of a model, on as many lines as its width takes."""
    what, how = of_tensor(site, tensor), f"{criterion} {level}"
    return f"{what}{', ' if len(what) + len(how) < LINE else chr(10)}{how}"


def columns_for(count: int) -> int:
    """Columns in which a number of panels looks even."""
    return count if count <= 4 else 3 if count in (5, 6, 9) else 4


def grid(
    count: int,
    *,
    height: float = 1.7,
    columns: int | None = None,
    share_x: bool = True,
    share_y: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure with a number of panels, filled row by row.

    Args:
        count: panels, at least one.
        height: of one row, inches.
        columns: None picks.
        share_x: one range for all panels, labelled below each column's last.
        share_y: one range for all panels, labelled in the first column.
    """
    columns = min(columns or columns_for(count), count)
    rows = math.ceil(count / columns)
    height = max(height, 2.2) if rows == 1 else height
    width = NARROW if columns == 1 else min(WIDE, 2.6 * columns)
    figure = Figure((width, min(rows * height + 0.9, TALL)), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share_x, sharey=share_y, squeeze=False)
    for spare in axes.flat[count:]:
        spare.remove()
    if rows > 1:
        for above in axes[-2, (count - 1) % columns + 1 :]:
            above.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


# Of a figure in which each row would say so.
NO_VALUE = "No value in this run: dense accuracy not above chance, or no usable result."


def empty(message: str) -> Figure:
    """A figure for what the run did not measure."""
    figure = NothingToShow((NARROW, 1.2), layout="constrained")
    figure.text(0.5, 0.5, message, ha="center", va="center", color=GREY, wrap=True)
    return figure


def label(figure: Figure, x: str, y: str = "", note: str = "") -> None:
    """Label the axes of the whole figure; `note` goes on lines of its own below, as wide as the figure.

    The y axis's label has as many lines as the panels' height makes of it.
    """
    lines = [wrap(line, int(figure.get_figwidth() / CHARACTER)) for line in note.splitlines()]
    figure.supxlabel("\n".join(filter(None, (x, *lines))), fontsize=7.5)
    if y:
        height = int((figure.get_figheight() - ABOVE_AND_BELOW) / CHARACTER)
        figure.supylabel(wrap(y, height), fontsize=7.5)


def sample(mark: Mark, name: str) -> Line2D:
    """A legend's entry."""
    return Line2D([], [], color=mark.color, marker=mark.marker, linestyle=mark.dashes, label=name)


def legend(figure: Figure, marks: Mapping[str, Mark], *others: Line2D) -> None:
    """A legend above all panels."""
    handles = [*(sample(mark, name) for name, mark in marks.items()), *others]
    longest = max(len(str(handle.get_label())) for handle in handles)
    per_row = max(1, int(figure.get_figwidth() / max(1.02, 0.5 + 0.055 * longest)))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), per_row),
        handlelength=2.8,
        columnspacing=1.0,
    )


def rule(name: str, dashes: Dashes = (0, (4, 2))) -> Line2D:
    """A legend's entry for a bar drawn with `ax.axhline`."""
    return Line2D([], [], color=GREY, linewidth=0.8, linestyle=dashes, label=name)


def percent_axis(axis: Axis, ticks: int = 5) -> None:
    """Ticks of a share (0 to 1) as percent without a sign; the label names the unit."""
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}"))


def size_text(count: float) -> str:
    """A number of parameters: 443k, 1.6M, 7.6B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"
