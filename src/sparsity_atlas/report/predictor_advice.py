"""What is advised where a predictor may be trained, and what a probe that was tried missed."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sparsity_atlas.report.crossings import dropped, speedups, usable
from sparsity_atlas.report.measured_time import Advice, critical_row
from sparsity_atlas.studies.mask_table import RECALL
from sparsity_atlas.tables.read import records
from sparsity_atlas.terms import EVERY_PHASE


def predicted(
    rows: pd.DataFrame, curves: pd.DataFrame, masks: pd.DataFrame, *, gated: bool
) -> Advice | None:
    """What the zeros of i would spare if they were known before u and g are made.

    Args:
        rows: critical sparsities by a loss.
        curves: of the model.
        masks: of the model, where predictors may have been tried.
        gated: whether its FFN has a gate.
    """
    some = usable(rows[rows["site"] == "intermediate"])
    if some.empty:
        return None
    best = max(records(some), key=lambda one: one.ideal_speedup)
    maps = 3 if gated else 2
    bounds = [
        1 / (1 - maps * (1 - 1 / one)) for one in (best.ideal_speedup, *speedups(best, curves))
    ]
    text = (
        f"A predictor that names the entries of intermediate which {best.criterion} drops, "
        f"{dropped(best)}, spares rows of {'both factors' if gated else 'W_u'} and of W_d: "
        f"{bounds[0]:.2f} times as fast ({bounds[1]:.2f} to {bounds[2]:.2f}) if it costs nothing and "
        f"never errs, where without it are {best.ideal_speedup:.2f}."
    )
    probe = _probed(best, curves, masks)
    if probe is None:
        return Advice(f"{text} What it gets wrong was not measured.", (critical_row(best),))
    return Advice(f"{text} {probe.text}", (critical_row(best), *probe.rows))


def _probed(best: Any, curves: pd.DataFrame, masks: pd.DataFrame) -> Advice | None:
    """What the probe of the largest rank missed at the level that drops most nearly as much."""
    tried = masks[
        (masks["criterion"] == best.criterion)
        & (masks["site"] == "intermediate")
        & (masks["quantity"] == RECALL["probe"])
    ]
    if "part" in tried:
        tried = tried[tried["part"].fillna("") == ""]
    levels = curves[
        (curves["criterion"] == best.criterion)
        & (curves["site"] == "intermediate")
        & (curves["task"] == best.task)
        & (curves["phase"] == EVERY_PHASE)
        & curves["level"].isin(tried["level"])
        & curves["sparsity"].notna()
    ]
    if levels.empty:
        return None
    nearest = levels.loc[(levels["sparsity"] - best.value).abs().idxmin()]
    tried = tried[tried["level"] == nearest["level"]].sort_values("at")
    row = list(records(tried))[-1]
    text = (
        f"On the captured text a least-squares probe of rank {row.at:g} named {row.value:.0%} of what is "
        f"kept at level {row.level}, which drops {nearest['sparsity']:.1%} "
        f"({row.low:.0%} to {row.high:.0%} by layer)."
    )
    named = f"masks.csv: {row.model}, {row.criterion}, {row.site}, {row.level}, {row.quantity}, {row.at:g}"
    return Advice(text, (named,))


def no_predictor(model: str, rows: pd.DataFrame) -> Advice:
    """Why nothing is said of a predictor."""
    own = rows[rows["site"] == "intermediate"]
    if own.empty:
        text = "What a predictor would add: no loss was measured at intermediate."
        return Advice(text, (f"critical_sparsity.csv: {model}, no row of a loss at intermediate",))
    text = (
        "What a predictor would add: at intermediate no sparsity is known at which the bar is kept."
    )
    return Advice(text, tuple(critical_row(row) for row in records(own)))
