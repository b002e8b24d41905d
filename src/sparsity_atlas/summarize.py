"""Stage `summarize`: the tables. Every number that a figure shows stands in one of them.

critical_sparsity.csv   model × criterion × site × task × bar: critical and PPL-p% sparsity
curves.csv              … × level: induced sparsity, score, retained accuracy, added loss
comparison.csv          model × site × task × sparsity × criterion: scores at equal induced sparsity, and
                        their paired differences from the first criterion
layers.csv              … × level × tensor × layer: induced sparsity under the tasks, and, from the
                        captured text, induced sparsity and FFN-output error
metrics.csv             model × tensor × layer: effective rank, Gini, Hoyer, zeros
magnitudes.csv          model × tensor: histogram of log10(|v| / RMS)
output_error.csv        model × criterion × site × level: over the layers, mean induced sparsity
                        and mean, smallest and largest FFN-output error on the captured text
allocation.csv          model × criterion × site × tensor × layer × sparsity, of criteria with an
                        allocation: damage of this layer alone at this sparsity, and its own sparsity
                        where this is the target
scaling.csv             criterion × family × site × task × bar: slope over log10 of the
                        non-embedding parameters
models.csv              one row a model: source, architecture, sizes
failures.csv            every task at every level that failed numerically, and why
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sparsity_atlas import cli
from sparsity_atlas.calibration import read_calibration
from sparsity_atlas.comparison import COMPARISON, comparison_rows
from sparsity_atlas.critical import CriticalRow
from sparsity_atlas.curves import CurvePoint
from sparsity_atlas.metrics import BIN_EDGES
from sparsity_atlas.scaling import SCALING, scaling_rows
from sparsity_atlas.store import read_manifest, write_text

# Sums over samples differ in their last digits between numbers of threads; ten digits do not.
DIGITS = 10


def _format(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return format(value, f".{DIGITS}g") if isinstance(value, float) else value


def write_csv(path: Path, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a table atomically; None becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_format(row[column]) for column in columns])
    write_text(path, buffer.getvalue())


def _key(path: Path) -> dict[str, str]:
    """Model, criterion and site from results/{model}/{criterion}/{site}/<file>."""
    return dict(zip(("model", "criterion", "site"), path.parts[-4:-1], strict=True))


KEY = ["model", "criterion", "site"]
SIZES = ["parameters", "non_embedding_parameters", "layers"]
CRITICAL = [*KEY, *SIZES, *(one.name for one in fields(CriticalRow))]
POINTS = [*KEY, *(one.name for one in fields(CurvePoint))]
LAYERS = [*KEY, "level", "tensor", "layer", "sparsity", "captured_sparsity", "output_error"]
METRICS = ["model", "tensor", "layer", "tokens", "width", "effective_rank", "effective_rank_share"]
METRICS += ["gini", "hoyer", "near_zero", "exact_zero", "rms"]
MAGNITUDES = ["model", "tensor", "low", "high", "share"]
ERRORS = [*KEY, "level", "sparsity", "error", "error_low", "error_high"]
ALLOCATION = [*KEY, "allocation", "tensor", "layer", "sparsity", "damage", "own_sparsity"]
MODELS = ["model", "source", "revision", "architecture", "activation", "family", "dtype", *SIZES]
MODELS += ["hidden", "width", "sites", "digest"]
FAILURES = [*KEY, "level", "task", "reason"]


def model_sizes(paths: list[Path]) -> dict[str, dict[str, int]]:
    """Sizes of each model, by its folder's name."""
    sizes = {}
    for path in paths:
        manifest = read_manifest(path)
        sizes[path.parent.name] = {
            "parameters": manifest["parameters"]["total"],
            "non_embedding_parameters": manifest["parameters"]["non_embedding"],
            "layers": manifest["layers"],
        }
    return sizes


def critical_rows(curves: list[Path], sizes: dict[str, dict[str, int]]) -> Iterator[dict[str, Any]]:
    """Rows of critical_sparsity.csv, one curve in memory at a time."""
    for path in curves:
        key = _key(path)
        for row in read_manifest(path)["critical"]:
            yield {**key, **sizes[key["model"]], **row}


def curve_rows(curves: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of curves.csv."""
    for path in curves:
        for row in read_manifest(path)["points"]:
            yield {**_key(path), **row}


def layer_rows(curves: list[Path], sparsity: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of layers.csv."""
    captured = {
        (*_key(path).values(), row["level"], row["layer"]): row
        for path in sparsity
        for row in pq.read_table(path).to_pylist()
    }
    for path in curves:
        key = _key(path)
        for level, tensors in read_manifest(path)["layers"].items():
            for tensor, shares in tensors.items():
                for layer, share in enumerate(shares):
                    stored = captured.get((*key.values(), level, layer), {})
                    yield {
                        **key,
                        **{"level": level, "tensor": tensor, "layer": layer, "sparsity": share},
                        "captured_sparsity": stored.get("sparsity"),
                        "output_error": stored.get("error"),
                    }


def metric_rows(metrics: list[Path]) -> list[dict[str, Any]]:
    """Rows of metrics.csv and the histograms; `all_inputs` repeats other sites' tensors."""
    rows = {}
    for path in metrics:
        for row in pq.read_table(path).to_pylist():
            rows.setdefault((path.parts[-3], row["tensor"], row["layer"]), row)
    return [{"model": model, **row} for (model, _, _), row in rows.items()]


def magnitude_rows(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of magnitudes.csv: the histograms of a model's layers, pooled; zeros are left out."""
    pooled: dict[tuple[str, str], np.ndarray] = {}
    for row in rows:
        key = (row["model"], row["tensor"])
        pooled[key] = pooled.get(key, 0) + np.array(row["histogram"])
    for (model, tensor), counts in pooled.items():
        for low, high, count in zip(BIN_EDGES[:-1], BIN_EDGES[1:], counts, strict=True):
            yield {
                **{"model": model, "tensor": tensor, "low": float(low), "high": float(high)},
                "share": float(count / max(counts.sum(), 1)),
            }


def error_rows(sparsity: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of output_error.csv; a level with a layer whose dense output is all zeros is left out."""
    for path in sparsity:
        levels: dict[str, list[dict[str, Any]]] = {}
        for row in pq.read_table(path).to_pylist():
            levels.setdefault(row["level"], []).append(row)
        for level, rows in levels.items():
            errors = [row["error"] for row in rows]
            if None not in errors:
                yield {
                    **_key(path),
                    "level": level,
                    "sparsity": float(np.mean([row["sparsity"] for row in rows])),
                    "error": float(np.mean(errors)),
                    "error_low": min(errors),
                    "error_high": max(errors),
                }


def allocation_rows(curves: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of allocation.csv, from the calibrations beside the curves."""
    for path in curves:
        calibration = path.with_name("calibration.safetensors")
        if not calibration.is_file():
            continue
        found = read_calibration(calibration, "np")
        for place, state in found.states.items():
            if "share" not in state:
                continue
            tensor, _, layer = place.rpartition(".")
            targets = np.linspace(0, 1, len(state["share"]))
            own = np.interp(state["grid"], targets, state["share"])
            for level, damage, share in zip(state["grid"], state["damage"], own, strict=True):
                yield {
                    **_key(path),
                    "allocation": found.about["criterion"]["allocation"],
                    **{"tensor": tensor, "layer": int(layer), "sparsity": round(float(level), 6)},
                    **{"damage": float(damage), "own_sparsity": round(float(share), 6)},
                }


def model_rows(paths: list[Path]) -> list[dict[str, Any]]:
    """Rows of models.csv. A family shares its architecture and its activation."""
    sizes = model_sizes(paths)
    rows = []
    for path in paths:
        manifest = read_manifest(path)
        source = manifest["source"]
        rows.append(
            {
                **{key: manifest[key] for key in MODELS if key in manifest},
                **sizes[path.parent.name],
                "model": path.parent.name,
                "source": source.get("hub") or source["path"],
                "family": f"{manifest['architecture']}, {manifest['activation']}",
                "sites": " ".join(manifest["sites"]),
            }
        )
    return rows


def failure_rows(curves: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of failures.csv."""
    for path in curves:
        for row in read_manifest(path)["failures"]:
            yield {**_key(path), **row}


def write_tables(
    folder: Path,
    models: list[Path],
    curves: list[Path],
    sparsity: list[Path],
    metrics: list[Path],
) -> None:
    """Write all tables of a run into a folder.

    Args:
        folder: where the CSV files go.
        models: manifests of the models; every file of the other lists belongs to one of them.
        curves: curve.json files, with equal_sparsity.parquet beside each.
        sparsity: sparsity.parquet files.
        metrics: Parquet files of `metrics`.
    """
    critical = list(critical_rows(curves, model_sizes(models)))
    described = model_rows(models)
    families = {row["model"]: row["family"] for row in described}
    measured = metric_rows(metrics)
    write_csv(folder / "critical_sparsity.csv", CRITICAL, critical)
    write_csv(folder / "curves.csv", POINTS, curve_rows(curves))
    write_csv(folder / "comparison.csv", COMPARISON, comparison_rows(curves, sparsity))
    write_csv(folder / "layers.csv", LAYERS, layer_rows(curves, sparsity))
    write_csv(folder / "metrics.csv", METRICS, measured)
    write_csv(folder / "magnitudes.csv", MAGNITUDES, magnitude_rows(measured))
    write_csv(folder / "output_error.csv", ERRORS, error_rows(sparsity))
    write_csv(folder / "allocation.csv", ALLOCATION, allocation_rows(curves))
    write_csv(folder / "scaling.csv", SCALING, scaling_rows(critical, families))
    write_csv(folder / "models.csv", MODELS, described)
    write_csv(folder / "failures.csv", FAILURES, failure_rows(curves))


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_atlas.summarize", description=__doc__)
    parser.add_argument(
        "what", choices=("model", "tables"), help="one model's summary, or all tables"
    )
    parser.add_argument("--models", required=True, nargs="+", type=Path, help="manifests of models")
    parser.add_argument(
        "--curves", nargs="*", type=Path, default=[], help="curve.json of each curve"
    )
    parser.add_argument(
        "--sparsity", nargs="*", type=Path, default=[], help="sparsity.parquet of each"
    )
    parser.add_argument("--metrics", nargs="*", type=Path, default=[], help="Parquet of each site")
    parser.add_argument(
        "--output", required=True, type=Path, help="CSV file, or the tables' folder"
    )
    arguments = parser.parse_args()

    if arguments.what == "model":
        rows = critical_rows(arguments.curves, model_sizes(arguments.models))
        write_csv(arguments.output, CRITICAL, rows)
        return
    write_tables(
        arguments.output,
        arguments.models,
        arguments.curves,
        arguments.sparsity,
        arguments.metrics,
    )


if __name__ == "__main__":
    cli.run(main)
