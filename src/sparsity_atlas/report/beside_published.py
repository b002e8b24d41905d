"""Every published number, and ours beside it where the run has one of the same model, rule and site."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from sparsity_atlas.report.published import PUBLISHED
from sparsity_atlas.report.published_scores import (
    ACCURACY,
    CRITICAL,
    LIMIT,
    PERPLEXITY,
    PPL_SPARSITY,
    SCORES,
    ZEROS,
    Score,
)
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, records
from sparsity_atlas.terms import AVERAGE, IN_NATS

COLUMNS = ["source_model", "rule", "site", "quantity", "source_task", "at"]
COLUMNS += ["published_dense", "published", "published_change", "source", "setting"]
COLUMNS += ["model", "criterion", "task", "dense", "ours", "ours_low", "ours_high", "change"]


_NAMES = {
    **{ZEROS: "zeros", CRITICAL: "critical sparsity", PPL_SPARSITY: "PPL-1% sparsity"},
    LIMIT: "limit of the activation ratio",
}


def published_scores() -> list[Score]:
    """All of them, those of the headline table among them."""
    paper = [
        Score(model, "topp", site, CRITICAL, "", None, None, one.percent, one.source)
        for model, sites in PUBLISHED.items()
        for site, one in sites.items()
    ]
    return [*paper, *SCORES]


def rows(tables: Tables, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each published number and each curve of ours beside it; one where there is no curve.

    Changes are of perplexity the share by which it rises, of accuracy the share that is kept: two texts or
    suites have these in common, and not their levels. Percent throughout, but for `at`.

    Args:
        tables: of the run.
        config: content of run_config.yaml, which says what each criterion is.
    """
    names: dict[str, list[str]] = {}
    for row in records(tables.models):
        names.setdefault(row.source, []).append(row.model)
    for score in published_scores():
        about = {
            **{"source_model": score.model, "rule": score.rule, "site": score.site},
            **{"quantity": score.quantity, "source_task": score.task, "at": score.at},
            **{"published_dense": score.dense, "published": score.value},
            "published_change": _change(score.quantity, score.dense, score.value),
            **{"source": score.source, "setting": score.setting},
        }
        found = [
            one for name in names.get(score.model, []) for one in _ours(tables, config, score, name)
        ]
        yield from ({**dict.fromkeys(COLUMNS), **about, **one} for one in found or [{}])


def shown(tables: Tables, config: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The rows that have a number of ours and are not in the headline table, as text."""
    for row in rows(tables, config):
        if row.get("ours") is None or (row["quantity"] == CRITICAL and not row["source_task"]):
            continue
        what = _NAMES.get(row["quantity"], row["quantity"])
        at = "" if row["at"] is None else f" at {row['at']:g}"
        yield {
            **{name: str(row.get(name) or "") for name in ("model", "criterion", "site")},
            "what": what + at + (f", {row['source_task']}" if row["source_task"] else ""),
            "published": _told(row["published_dense"], row["published"], row["published_change"]),
            "ours": _told(row.get("dense"), row["ours"], row.get("change")),
            "source": "; ".join(filter(None, (row["source"], row["setting"]))),
        }


def _told(dense: float | None, value: float, change: float | None) -> str:
    if change is None or dense is None:
        return f"{value:.2f}"
    return f"{dense:.2f} → {value:.2f} ({change:.1f} %)"


def _change(quantity: str, dense: float | None, value: float) -> float | None:
    if dense is None or quantity not in (PERPLEXITY, ACCURACY):
        return None
    return 100 * (value / dense - (quantity == PERPLEXITY))


def _ours(
    tables: Tables, config: dict[str, Any], score: Score, model: str
) -> Iterator[dict[str, Any]]:
    if score.quantity == ZEROS and score.at is None:
        yield from _exact_zeros(tables, score, model)
        return
    for criterion in tables.criteria():
        if not follows(criterion, score.rule, config):
            continue
        key = {"model": model, "criterion": criterion}
        if score.quantity == CRITICAL:
            task: str | None = score.task or AVERAGE
            found = _critical(_of(tables.critical_sparsity, score, **key), task, ("accuracy",))
        elif score.quantity == PPL_SPARSITY:
            task = tables.loss_task()
            found = _critical(_of(tables.critical_sparsity, score, **key), task, IN_NATS)
        elif score.quantity == LIMIT:
            found = _limit(tables, score, **key)
        elif score.quantity == ZEROS:
            found = _zeros(_of(tables.output_error, score, **key), score)
        else:
            found = _at_sparsity(_of(tables.curves, score, **key), score, tables.loss_task())
        if found is not None:
            yield {**key, **found}


def follows(criterion: str, rule: str, config: dict[str, Any]) -> bool:
    """Whether a criterion of the configuration is a built-in rule without parameters of its own."""
    entry = dict((config.get("criteria") or {}).get(criterion) or {})
    named = entry.pop("rule", None) or criterion
    if named == "topp" and entry.get("power") == 1:
        del entry["power"]
    return named == rule and not {"file", "power", "calibration", "allocation"} & entry.keys()


def _of(rows: pd.DataFrame, score: Score, model: str, criterion: str) -> pd.DataFrame:
    same = (
        (rows["model"] == model) & (rows["criterion"] == criterion) & (rows["site"] == score.site)
    )
    return rows[same]


def _critical(
    rows: pd.DataFrame, task: str | None, kinds: tuple[str, ...]
) -> dict[str, Any] | None:
    own = rows[(rows["bar"] == HEADLINE_BAR) & (rows["task"] == task) & rows["kind"].isin(kinds)]
    if own.empty or pd.isna(own["value"].iloc[0]):
        return None
    row = own.iloc[0]
    ends = {f"ours_{end}": 100 * row[f"interval_{end}"] for end in ("low", "high")}
    # Of a loss in nats a token the perplexity.
    accuracy = row["kind"] == "accuracy"
    dense = 100 * row["dense_value"] if accuracy else math.exp(row["dense_value"])
    return {"task": task, "dense": dense, "ours": 100 * row["value"], **_known(ends)}


def _limit(tables: Tables, score: Score, model: str, criterion: str) -> dict[str, Any] | None:
    """The limit of a training of ours, once: beside its last checkpoint."""
    models = tables.models.set_index("model")
    series = models.loc[model, "series"] if "series" in models else ""
    rows, task = tables.training_fits, tables.loss_task()
    own = rows[
        (rows["series"] == series)
        & (rows["criterion"] == criterion)
        & (rows["site"] == score.site)
        & (rows["task"] == task)
        & (rows["bar"] == HEADLINE_BAR)
        & rows["of_activation"]
        & rows["resolved"]
    ]
    if own.empty or model in tables.earlier():
        return None
    row = own.iloc[0]
    ends = {f"ours_{end}": 100 * row[f"limit_{end}"] for end in ("low", "high")}
    return {"task": task, "ours": 100 * row["limit"], **_known(ends)}


def _at_sparsity(rows: pd.DataFrame, score: Score, loss: str | None) -> dict[str, Any] | None:
    """Perplexity or accuracy at a sparsity, on straight lines between the levels; none beyond them."""
    task = loss if score.quantity == PERPLEXITY else AVERAGE
    own = rows[(rows["task"] == task) & rows["value"].notna()]
    dense, levels = (
        own[own["level"] == "dense"],
        own[own["level"] != "dense"].sort_values("sparsity"),
    )
    if dense.empty or levels.empty or score.at is None:
        return None
    known = np.array([dense["sparsity"].iloc[0], *levels["sparsity"]])
    if not known.min() <= score.at <= known.max():
        return None
    values = np.array([dense["value"].iloc[0], *levels["value"]])
    order = np.argsort(known, kind="stable")
    value = float(np.interp(score.at, known[order], values[order]))
    start = float(values[0])
    if score.quantity == PERPLEXITY:
        start, value = math.exp(start), math.exp(value)
    else:
        start, value = 100 * start, 100 * value
    change = _change(score.quantity, start, value) if start else None
    return {"task": task, "dense": start, "ours": value, "change": change}


def _zeros(rows: pd.DataFrame, score: Score) -> dict[str, Any] | None:
    own = rows[rows["level"].astype(float) == score.at]
    if "part" in own:
        own = own[own["part"] == ""]
    return None if own.empty else {"ours": 100 * float(own["sparsity"].iloc[0])}


def _exact_zeros(tables: Tables, score: Score, model: str) -> Iterator[dict[str, Any]]:
    rows = tables.metrics
    own = rows[(rows["model"] == model) & (rows["tensor"] == score.site)]["exact_zero"].dropna()
    if len(own):
        yield {"model": model, "ours": 100 * float(own.mean())}


def _known(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if pd.isna(value) else value for name, value in values.items()}
