"""Which number of a task makes its curve: an accuracy-like metric of each sample, the loss, or its bound."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.terms import IN_NATS, Kind

# In this order, where the configuration names no metric; the last two are HumanEval's and MBPP's.
PREFERRED = ("acc", "exact_match", "em", "f1", "pass@1", "pass_at_1")
# lm-eval's perplexities; for whole documents all of them stand for nats a token.
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity", *IN_NATS)


def choose_metric(task: str, wanted: str | None, result: dict[str, Any]) -> tuple[Kind, str | None]:
    """The metric of a task's curve.

    Args:
        task: name in the configuration.
        wanted: `metric` or `metric,filter` from the configuration, if any.
        result: what eval.json says of the task (dense).

    Returns:
        ("loss", None), of a masked-diffusion model ("bound", None), or ("accuracy", "metric,filter").

    Raises:
        AtlasError: the task has no such metric, or it does not grow with quality.
    """
    rolling = result["output_types"] == ["loglikelihood_rolling"]
    # Of all tasks of a group: every sample must have it.
    leaves = [result["scores"][leaf] for leaf in result["leaves"]]
    available = sorted(
        key for key in leaves[0] if "_stderr," not in key and all(key in leaf for leaf in leaves)
    )
    if rolling and (wanted is None or wanted.split(",")[0] in PERPLEXITIES):
        return ("bound" if "bound" in result else "loss"), None
    key = _find(wanted, available) if wanted else _prefer(available)
    if key is None:
        found = ", ".join(available) or "none"
        raise AtlasError(f"tasks.{task}: metric: no '{wanted or 'acc'}' among its metrics: {found}")
    name = key.split(",")[0]
    growing = [leaf[name] for leaf in result["higher_is_better"].values() if name in leaf]
    if not growing or not all(growing):
        raise AtlasError(
            f"tasks.{task}: metric: '{name}' does not grow with quality; choose one that does"
        )
    return "accuracy", key


def _find(wanted: str, available: list[str]) -> str | None:
    if "," in wanted:
        return wanted if wanted in available else None
    matches = [key for key in available if key.split(",")[0] == wanted]
    # `none` is lm-eval's name for no filter; with several filters the first by name.
    return f"{wanted},none" if f"{wanted},none" in matches else next(iter(matches), None)


def _prefer(available: list[str]) -> str | None:
    return next((key for name in PREFERRED if (key := _find(name, available))), None)


def sample_values(task: str, key: str | None, metrics: Iterable[Any]) -> list[float]:
    """A metric of each sample.

    Args:
        task: name in the configuration.
        key: `metric,filter`, which every accuracy has.
        metrics: the column of the sample table.

    Raises:
        TaskFailure: some documents lack it, or it is no number there; or all do: lm-eval computes it from
            all samples together (such as a correlation).
    """
    values = [dict(one).get(key) for one in metrics]
    found = [one for one in values if one is not None]
    lacking = len(values) - len(found)
    if lacking:
        why = (
            "is no mean over samples; choose one that is, such as acc"
            if not found
            else f"is missing in {lacking} of {len(values)} documents; choose one that all of them have"
        )
        raise TaskFailure(f"tasks.{task}: metric: '{key}' {why}")
    wild = sum(not math.isfinite(value) for value in found)
    if wild:
        raise TaskFailure(
            f"tasks.{task}: metric: '{key}' is NaN or infinite in {wild} of {len(found)} documents"
        )
    return found


def pooled_score(task: str, kind: Kind, key: str | None, rows: list[dict[str, Any]]) -> float:
    """A task's score over its samples: mean of the metric, or nats a token.

    Args:
        task: name in the configuration.
        kind: as `choose_metric` gives it.
        key: likewise.
        rows: the task's rows of the sample table.

    Raises:
        TaskFailure: see `sample_values`.
    """
    if kind in IN_NATS:
        nats: float = sum(row["nats"] for row in rows)
        predicted: int = sum(row["predicted"] for row in rows)
        return nats / predicted
    return sum(sample_values(task, key, (row["metrics"] for row in rows))) / len(rows)
