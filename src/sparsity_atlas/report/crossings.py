"""Crossings of the headline bar: which can be gone by, their ideal speed-ups, and how they are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import records
from sparsity_atlas.terms import EVERY_PHASE, IN_NATS


def usable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows at whose sparsity the bar is kept, as far as can be told."""
    return rows[rows["resolved"] & (rows["relation"] != "<") & rows["ideal_speedup"].notna()]


def ranked(rows: pd.DataFrame) -> list[Any]:
    """Those, from the largest ideal speed-up down."""
    some = usable(rows).sort_values("ideal_speedup", ascending=False, kind="stable")
    return list(records(some))


def speedups(row: Any, curves: pd.DataFrame) -> tuple[float, float]:
    """Ideal speed-ups at the ends of a crossing's interval."""
    points = curves[
        (curves["criterion"] == row.criterion)
        & (curves["site"] == row.site)
        & (curves["task"] == row.task)
        & (curves["phase"] == EVERY_PHASE)
        & curves["sparsity"].notna()
        & curves["ideal_speedup"].notna()
    ].sort_values("sparsity")
    shares = 1 - 1 / points["ideal_speedup"]
    ends = np.interp([row.interval_low, row.interval_high], points["sparsity"], shares)
    low, high = (1 / (1 - ends)).tolist()
    return low, high


def between(row: Any, curves: pd.DataFrame) -> str:
    """The interval of the ideal speed-up, with < and > where its ends lie beyond what was measured."""
    low, high = speedups(row, curves)
    return f"{'<' if row.low_open else ''}{low:.2f} to {'>' if row.high_open else ''}{high:.2f}"


def dropped(row: Any) -> str:
    sign = {"=": "", ">=": "at least ", "<": "below "}[row.relation]
    low, high = in_percent(
        row.interval_low, row.interval_high, 1, opened=(row.low_open, row.high_open)
    )
    return f"{sign}{100 * row.value:.1f} % ({low} to {high})"


def where_of(row: Any) -> str:
    if row.kind not in IN_NATS:
        return ", where 1 % of the accuracy over all tasks is lost"
    bound = "the bound of the " if row.kind == "bound" else "the "
    return f", where {bound}perplexity of {row.task} is 1 % higher"
