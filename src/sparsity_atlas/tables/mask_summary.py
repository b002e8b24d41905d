"""How masks of a sequence's tokens go together, over the layers; from what `output_error` counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.studies.mask_table import ALWAYS, FREQUENCY, JACCARD, REUSE, SCHEMA

MASKS = ["model", "criterion", "site", "level", "tensor", "quantity", "at"]
MASKS += ["value", "low", "high", "independent", "by_frequency"]
# Of layers.csv: a layer's own numbers, and the quantity and place that they are.
NEIGHBOURS = {
    "neighbour_reuse": (REUSE, 1),
    "neighbour_jaccard": (JACCARD, 1),
    "never_kept": (FREQUENCY, 0),
    "always_kept": (ALWAYS, 1),
}


def read_masks(beside: Path) -> list[dict[str, Any]]:
    """Rows of the masks.parquet beside a sparsity.parquet."""
    rows: list[dict[str, Any]] = read_parquet(beside.with_name("masks.parquet"), SCHEMA).to_pylist()
    return rows


def mask_rows(key: dict[str, str], rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A curve's rows of masks.csv: the mean over the layers, the smallest and the largest."""
    names = ("level", "part", "tensor", "quantity", "at")
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["value"] is not None:
            found.setdefault(tuple(row[name] for name in names), []).append(row)
    for place, layers in found.items():
        values = [row["value"] for row in layers]
        yield {
            **key,
            **dict(zip(names, place, strict=True)),
            **{"value": _mean(values), "low": min(values), "high": max(values)},
            **{
                name: _mean([row[name] for row in layers])
                for name in ("independent", "by_frequency")
            },
        }


def neighbours(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The columns NEIGHBOURS by level, tensor and layer; of several parts the mean of theirs."""
    wanted = {place: name for name, place in NEIGHBOURS.items()}
    found: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for row in rows:
        name = wanted.get((row["quantity"], row["at"]))
        if name is not None:
            own = found.setdefault((row["level"], row["tensor"], row["layer"]), {})
            own.setdefault(name, []).append(row["value"])
    return {
        place: {name: _mean(values) for name, values in own.items()} for place, own in found.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
