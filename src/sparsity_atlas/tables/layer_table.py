"""Layer by layer: induced sparsity under the tasks and on the captured text, and output errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.tables.mask_summary import NEIGHBOURS, neighbours
from sparsity_atlas.terms import EVERY_PHASE

_KEY = ["model", "criterion", "site"]
LAYERS = [
    *_KEY,
    "level",
    "phase",
    "tensor",
    "layer",
    "sparsity",
    "captured_sparsity",
    "output_error",
]
LAYERS += ["target_of", "target", "reached", *NEIGHBOURS]
ERRORS = [*_KEY, "level", "sparsity", "error", "error_low", "error_high"]


def layer_rows(
    key: dict[str, str],
    curve: dict[str, Any],
    captured: list[dict[str, Any]],
    masks: Iterable[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """A curve's rows of layers.csv, with those of its sparsity.parquet and masks.parquet beside them."""
    near = neighbours(masks)
    stored = {(row["level"], row["layer"]): row for row in captured}
    for level, tensors in curve["layers"].items():
        for tensor, shares in tensors.items():
            for layer, share in enumerate(shares):
                if share is None:  # dense here
                    continue
                beside = stored.get((level, layer), {})
                own = (one for one in beside.get("targets") or () if one["tensor"] == tensor)
                # Of several parts the one that is farthest from what is asked.
                asked: dict[str, Any] = max(own, key=_distance, default={})
                yield {
                    **key,
                    **{"level": level, "phase": EVERY_PHASE},
                    **{"tensor": tensor, "layer": layer, "sparsity": share},
                    "captured_sparsity": beside.get("sparsity"),
                    "output_error": beside.get("error"),
                    "target_of": asked.get("of"),
                    **{name: asked.get(name) for name in ("target", "reached")},
                    **dict.fromkeys(NEIGHBOURS),
                    **near.get((level, tensor, layer), {}),
                }
    for level, phases in curve["phases"].items():
        for phase, tensors in phases.items():
            for tensor, shares in tensors.items():
                for layer, share in enumerate(shares):
                    if share is not None:
                        place = {"level": level, "phase": phase, "tensor": tensor, "layer": layer}
                        yield {**dict.fromkeys(LAYERS), **key, **place, "sparsity": share}


def _distance(asked: dict[str, Any]) -> float:
    return abs(float(asked["reached"]) - float(asked["target"]))


def captured_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a sparsity.parquet."""
    # It brings zarr, which a model's summary does not need.
    from sparsity_atlas.studies.output_error import SCHEMAS

    rows: list[dict[str, Any]] = read_parquet(path, *SCHEMAS).to_pylist()
    return rows


def error_rows(key: dict[str, str], captured: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A curve's rows of output_error.csv, without levels of which a layer's dense output is all zeros."""
    levels: dict[str, list[dict[str, Any]]] = {}
    for row in captured:
        levels.setdefault(row["level"], []).append(row)
    for level, rows in levels.items():
        errors = [row["error"] for row in rows]
        if None not in errors:
            yield {**key, "level": level, "part": None, **_over_layers(rows)}
            by_part: dict[str, list[dict[str, Any]]] = {}
            for one in (part for row in rows for part in row.get("parts") or ()):
                by_part.setdefault(one["part"], []).append(one)
            for part, own in by_part.items():
                yield {**key, "level": level, "part": part, **_over_layers(own)}


def _over_layers(rows: list[dict[str, Any]]) -> dict[str, float]:
    errors = [row["error"] for row in rows]
    return {
        "sparsity": float(np.mean([row["sparsity"] for row in rows])),
        "error": float(np.mean(errors)),
        "error_low": min(errors),
        "error_high": max(errors),
    }
