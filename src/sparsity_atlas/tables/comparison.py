"""Criteria at equal induced sparsity: their scores, and their paired differences from a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.curves.equal_sparsity import SPARSITIES, Of, read_between, read_equal
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.statistics.bootstrap import interval
from sparsity_atlas.terms import by_projection, with_one_mask

COMPARISON = ["model", "site", "task", "kind", "sparsity_of", "sparsity", "criterion"]
COMPARISON += ["reference", "reference_site", "value", "value_low", "value_high"]
COMPARISON += ["difference", "difference_low", "difference_high", "output_error"]

_ByPlace = dict[tuple[str, Of, float], dict[str, Any]]


def comparison_rows(curves: Sequence[Path], sparsity: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of comparison.csv: every model and site that several criteria have.

    value: added loss in nats per token, or retained accuracy, at this induced sparsity. difference:
    the criterion's minus the reference's, the first criterion that the run names for the model and
    site; its interval is over bootstrap replicates that both share. sparsity_of: "entries", and
    "parameters" too where these give another number. output_error: mean over layers of the relative
    FFN-output error at this sparsity of the captured text's entries.

    A site where each map has a mask of its own is compared with the site where one mask serves them all, too
    (reference_site): a criterion with itself, and with that site's first one. Seven maps have more entries
    than the four vectors that they read, so that these are at equal sparsity of the parameters alone.

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
        if len(paths) > 1:
            base = _by_place(paths[0])
            for path in paths:
                of_entries = errors.get(path.parts[-4:-1], {})
                yield from _rows(path, _by_place(path), paths[0], base, of_entries)
        joined = groups.get((model, with_one_mask(site)), []) if by_projection(site) else []
        for path in paths if joined else ():
            rows = _of_parameters(_by_place(path))
            own = [one for one in joined if one.parts[-3] == path.parts[-3]]
            for reference in dict.fromkeys([*own, joined[0]]):
                base = _of_parameters(_by_place(reference))
                yield from _rows(path, rows, reference, base, {})


def _rows(
    path: Path, rows: _ByPlace, reference: Path, base: _ByPlace, errors: dict[float, float]
) -> Iterator[dict[str, Any]]:
    """A curve beside the one that differences are taken from; errors: by sparsity of entries."""
    model, criterion, site = path.parts[-4:-1]
    for key, row in rows.items():
        task, of, place = key
        yield {
            **{"model": model, "site": site, "task": task, "kind": row["kind"]},
            **{"sparsity_of": of, "sparsity": place, "criterion": criterion},
            **{"reference": reference.parts[-3], "reference_site": reference.parts[-2]},
            **_interval("value", row),
            **_interval("difference", _difference(row, base.get(key))),
            "output_error": errors.get(place) if of == "entries" else None,
        }


def _by_place(path: Path) -> _ByPlace:
    rows = read_equal(path.with_name("equal_sparsity.parquet"))
    return {(row["task"], row["sparsity_of"], row["sparsity"]): row for row in rows}


def _of_parameters(rows: _ByPlace) -> _ByPlace:
    """The rows at sparsities of parameters, which are those of entries where a curve has no others."""
    of: Of = "parameters" if any(key[1] == "parameters" for key in rows) else "entries"
    return {(key[0], "parameters", key[2]): row for key, row in rows.items() if key[1] == of}


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
