"""Criteria at equal induced sparsity: their scores, and their paired differences from a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.curves.equal_sparsity import SPARSITIES, read_between, read_equal
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.statistics.bootstrap import interval

COMPARISON = ["model", "site", "task", "kind", "sparsity_of", "sparsity", "criterion", "reference"]
COMPARISON += ["value", "value_low", "value_high"]
COMPARISON += ["difference", "difference_low", "difference_high", "output_error"]


def comparison_rows(curves: Sequence[Path], sparsity: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of comparison.csv: every model and site that several criteria have.

    value: added loss in nats per token, or retained accuracy, at this induced sparsity. difference:
    the criterion's minus the reference's, the first criterion that the run names for the model and
    site; its interval is over bootstrap replicates that both share. sparsity_of: "entries", and
    "parameters" too where these give another number. output_error: mean over layers of the relative
    FFN-output error at this sparsity of the captured text's entries.

    Args:
        curves: curve.json files, with equal_sparsity.parquet beside each.
        sparsity: sparsity.parquet files.
    """
    errors = {path.parts[-4:-1]: _errors(path) for path in sparsity}
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in curves:
        model, _, site = path.parts[-4:-1]
        groups.setdefault((model, site), []).append(path)
    for (model, site), paths in groups.items():
        if len(paths) < 2:
            continue
        reference = paths[0].parts[-3]
        base = _by_place(paths[0])
        for path in paths:
            criterion = path.parts[-3]
            of_entries = errors.get((model, criterion, site), {})
            for key, row in _by_place(path).items():
                task, of, place = key
                yield {
                    **{"model": model, "site": site, "task": task, "kind": row["kind"]},
                    **{"sparsity_of": of, "sparsity": place},
                    **{"criterion": criterion, "reference": reference},
                    **_interval("value", row),
                    **_interval("difference", _difference(row, base.get(key))),
                    "output_error": of_entries.get(place) if of == "entries" else None,
                }


def _by_place(path: Path) -> dict[tuple[str, str, float], dict[str, Any]]:
    rows = read_equal(path.with_name("equal_sparsity.parquet"))
    return {(row["task"], row["sparsity_of"], row["sparsity"]): row for row in rows}


def _difference(row: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any] | None:
    if base is None:
        return None
    shared = min(len(row["replicates"]), len(base["replicates"]))
    return {
        "value": row["value"] - base["value"],
        "replicates": row["replicates"][:shared] - base["replicates"][:shared],
    }


def _interval(name: str, row: dict[str, Any] | None) -> dict[str, float | None]:
    """A value with its 95 % interval; None where there is nothing to resample."""
    if row is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low = high = None
    if len(row["replicates"]):
        low, high = interval(row["value"], row["replicates"])
    return {name: row["value"], f"{name}_low": low, f"{name}_high": high}


def _errors(path: Path) -> dict[float, float]:
    """Mean output error at each of `SPARSITIES` that the levels of a curve span."""
    from sparsity_atlas.studies.output_error import SCHEMAS  # brings zarr

    levels: dict[str, list[tuple[float, float]]] = {}
    for row in read_parquet(path, *SCHEMAS).to_pylist():
        if row["error"] is not None:
            levels.setdefault(row["level"], []).append((row["sparsity"], row["error"]))
    means = sorted(tuple(np.mean(pairs, axis=0)) for pairs in levels.values())
    if not means:
        return {}
    x, y = np.array(means).T
    found = read_between(x, np.maximum.accumulate(y), SPARSITIES)
    return {
        place: float(value)
        for place, value in zip(SPARSITIES, found, strict=True)
        if np.isfinite(value)
    }
