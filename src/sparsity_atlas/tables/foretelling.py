"""Which cheap number of a model foretells how much can be dropped: rank correlations over models.

A point is a curve: (model, criterion, site). The cheap numbers need no evaluation: metrics of the site's
tensors, mean over the layers, and what the captured text shows of the criterion at a sparsity of one half.
The dear ones are PPL-1% sparsity and the critical sparsity of the average accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sparsity_atlas.statistics.rank_correlation import intervals, spearman
from sparsity_atlas.studies.mask_table import REUSE, UNUSED
from sparsity_atlas.terms import AVERAGE, IN_NATS, LEAST_MODELS, TENSORS, plain

FORETELLING = ["measure", "criterion", "site", "metric", "models", "points"]
FORETELLING += ["correlation", "low", "high", "resolved", "reason"]
HEADLINE_BAR = 0.99
EVERY = "all"
REPLICATES = 500
# Models below which an interval is too often too short to be believed, see docs/studies.md.
RESOLVING = 10
PPL, CRITICAL = "ppl_sparsity", "critical_sparsity"
TARGETS = (PPL, CRITICAL)
STORED = (
    *("effective_rank_share", "gini", "hoyer", "near_zero", "exact_zero", "at_most_zero"),
    *("kurtosis", "quantile_10", "quantile_50", "quantile_90", "quantile_99", "lid"),
)
# At this induced sparsity of the captured text, on straight lines between the levels.
HALF = 0.5
AT_HALF = ("output_error", "reuse", "unused_of_8")
CHEAP = ("non_embedding_parameters", *STORED, *AT_HALF)
Key = tuple[str, str, str]


class Foretelling:
    """Collects cheap and dear numbers of curves, in any order."""

    def __init__(self) -> None:
        self._targets: dict[str, dict[Key, float]] = {target: {} for target in TARGETS}
        self._sizes: dict[str, float] = {}
        self._stored: dict[tuple[str, str], dict[str, list[float]]] = {}
        self._at_half: dict[Key, dict[str, float]] = {}

    def add_critical(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of critical_sparsity.csv.

        Of losses the first task counts. A curve that never crosses its bar has no value.
        """
        for row in rows:
            self._sizes[row["model"]] = row.get(
                "active_non_embedding_parameters", row["non_embedding_parameters"]
            )
            if row["bar"] != HEADLINE_BAR or row["relation"] != "=":
                continue
            key = (row["model"], row["criterion"], row["site"])
            if row["kind"] in IN_NATS:
                self._targets[PPL].setdefault(key, row["value"])
            elif row["task"] == AVERAGE:
                self._targets[CRITICAL][key] = row["value"]

    def add_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of metrics.csv."""
        for row in rows:
            own = self._stored.setdefault((row["model"], row["tensor"]), {})
            for name in STORED:
                if row.get(name) is not None:
                    own.setdefault(name, []).append(row[name])

    def add_captured(
        self, key: Key, errors: Sequence[dict[str, Any]], masks: Sequence[dict[str, Any]]
    ) -> None:
        """A curve's rows of output_error.csv and masks.csv."""
        own = self._at_half.setdefault(key, {})
        whole = [row for row in errors if not row.get("part")]
        of = {row["level"]: row["sparsity"] for row in whole}
        own["output_error"] = _at_half([(row["sparsity"], row["error"]) for row in whole])
        for name, quantity, at in (("reuse", REUSE, 1), ("unused_of_8", UNUSED, 8)):
            values: dict[str, list[float]] = {}
            for row in masks:
                if (row["quantity"], row["at"]) == (quantity, at) and row["level"] in of:
                    values.setdefault(row["level"], []).append(row["value"])
            own[name] = _at_half(
                [(of[level], float(np.mean(one))) for level, one in values.items()]
            )

    def rows(self, seed: int = 0) -> Iterator[dict[str, Any]]:
        """Rows of foretelling.csv: each criterion at each site and at all of its sites together."""
        for target, values in self._targets.items():
            criteria = dict.fromkeys(key[1] for key in values)
            for criterion in criteria:
                own = [key for key in values if key[1] == criterion]
                sites = list(dict.fromkeys(key[2] for key in own))
                for site in (*sites, *([EVERY] if len(sites) > 1 else [])):
                    keys = [key for key in own if site in (key[2], EVERY)]
                    for row in self._correlations(keys, values, seed):
                        yield {"measure": target, "criterion": criterion, "site": site, **row}

    def _cheap(self, key: Key) -> list[float]:
        model, _, site = key
        stored = []
        for name in STORED:
            found = [
                one
                for tensor in TENSORS[plain(site)]
                for one in self._stored.get((model, tensor), {}).get(name, ())
            ]
            stored.append(float(np.mean(found)) if found else np.nan)
        at_half = self._at_half.get(key, {})
        return [self._sizes[model], *stored, *(at_half.get(name, np.nan) for name in AT_HALF)]

    def _correlations(
        self, keys: list[Key], targets: dict[Key, float], seed: int
    ) -> Iterator[dict[str, Any]]:
        table = np.array([self._cheap(key) for key in keys])
        target = np.array([targets[key] for key in keys])
        models = np.array([key[0] for key in keys])
        known = np.isfinite(table)
        # Columns that the same points have share their drawings.
        for pattern in np.unique(known.T, axis=0):
            columns = np.flatnonzero((pattern == known.T).all(1))
            own = table[pattern][:, columns]
            found = _numbers(own, target[pattern], models[pattern], seed)
            for place, column in enumerate(columns):
                yield {
                    "metric": CHEAP[column],
                    **{name: _plain(value[place]) for name, value in found.items()},
                    **_counted(models[pattern], _plain(found["correlation"][place]), found, place),
                }


def _numbers(
    values: np.ndarray, target: np.ndarray, models: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Correlations of each column, and their intervals."""
    nothing = np.full(values.shape[1], np.nan)
    several = len(np.unique(models))
    correlation = spearman(values, target) if several >= LEAST_MODELS else nothing
    ends = (nothing, nothing)
    if several >= LEAST_MODELS:
        ends = intervals(values, target, models, REPLICATES, seed)
    return {"correlation": correlation, "low": ends[0], "high": ends[1]}


def _counted(
    models: np.ndarray, correlation: float | None, found: dict[str, np.ndarray], place: int
) -> dict[str, Any]:
    """How many points and models there are, and whether they tell anything."""
    several = len(np.unique(models))
    low, high = found["low"][place], found["high"][place]
    if several < LEAST_MODELS:
        reason = f"fewer than {LEAST_MODELS} models"
    elif correlation is None or np.isnan(low):
        reason = "constant over the models"
    elif low <= 0 <= high:
        reason = "the interval holds zero"
    else:
        reason = f"fewer than {RESOLVING} models" if several < RESOLVING else ""
    counts = {"models": several, "points": len(models)}
    return {**counts, "resolved": not reason, "reason": reason}


def _at_half(points: list[tuple[float, float]]) -> float:
    """A value at the sparsity HALF; NaN where the levels do not lie around it."""
    known = sorted((x, y) for x, y in points if y is not None)
    if not known or not known[0][0] <= HALF <= known[-1][0]:
        return float("nan")
    sparsities, values = zip(*known, strict=True)
    return float(np.interp(HALF, sparsities, values))


def _plain(number: float) -> float | None:
    return None if np.isnan(number) else float(number)
