"""The per-sample table of a node: one Parquet file with every finished task and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsity_atlas.evaluation.headed_table import read_headed, write_headed
from sparsity_atlas.files.parquet import OtherColumns
from sparsity_atlas.terms import (
    ACCOUNTS,
    FFN,
    PHASES,
    TENSORS,
    layers_named,
    parts_named,
    plain,
    tensors_at,
)

SCHEMA = pa.schema(
    [
        ("task", pa.string()),  # key in the configuration
        ("leaf", pa.string()),  # lm-eval's task; differs for a group
        ("doc_id", pa.int64()),
        ("doc_hash", pa.string()),
        ("cluster", pa.string()),  # items made alike; null: each item by itself
        ("metrics", pa.map_(pa.string(), pa.float64())),  # "metric,filter" -> value of this sample
        ("nats", pa.float64()),  # negative log-likelihood of all that was predicted
        ("predicted", pa.int64()),  # tokens predicted
        ("cut_tokens", pa.int64()),  # that the longest request lost at its beginning
        ("unfinished", pa.int64()),  # texts that were generated up to their budget of tokens
        ("windows", pa.int64()),  # that a whole document was scored in; 0 for any other
        # Of each phase, and of requests with each token of the document once.
        *((f"{account}_tokens", pa.int64()) for account in ACCOUNTS),
        # By slot; empty where the task has no tokens of the kind.
        *((f"{account}_zeros", pa.list_(pa.int64())) for account in ACCOUNTS),
    ]
)


@dataclass
class SampleTable:
    """Contents of `samples.parquet`.

    Attributes:
        slots: `Slot.columns` of each entry of the zeros.
        tasks: for each task `{"fingerprint": digest, "result": what eval.json says of it}`.
        rows: for each task its samples, of `SCHEMA`.
    """

    slots: list[list[Any]]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, pa.Table] = field(default_factory=dict)

    def finished(self) -> dict[str, str]:
        """Fingerprints of the tasks that did not fail."""
        return {
            name: one["fingerprint"]
            for name, one in self.tasks.items()
            if one["result"]["status"] == "ok"
        }

    def write(self, path: Path) -> None:
        """Write the table atomically; the same contents give the same bytes."""
        order = sorted(self.tasks)
        header = {"slots": self.slots, "tasks": {k: self.tasks[k] for k in order}}
        write_headed(path, header, [self.rows[name] for name in order])


def read_table(path: Path) -> tuple[dict[str, Any], pa.Table]:
    """Header (`slots`, `tasks`) and rows of a sample table.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """
    return read_headed(path, SCHEMA, _check_header)


def at_site(slot: list[Any], site: str) -> bool:
    """Whether a slot of a header belongs to a site as paths spell it.

    In a dense table what several maps read is one slot, also where each has a mask of its own in others.
    """
    tensor, layer, _, *part = slot
    parts, layers = parts_named(site), layers_named(site)
    return (
        tensor in {*tensors_at(site), *TENSORS[plain(site)]}
        and (not parts or (part[0] if part else FFN) in parts)
        and (not layers or layer in layers)
    )


def zeros_in(rows: pa.Table, phase: str, slots: int) -> np.ndarray:
    """Zeros of each sample in a phase, int64 [rows, slots].

    Args:
        rows: of `SCHEMA`.
        phase: or another of `ACCOUNTS`.
        slots: that were counted.
    """
    # A task without tokens of the kind has empty lists, and a group may have both.
    column = rows[f"{phase}_zeros"].combine_chunks()
    counts = np.zeros((len(rows), slots), np.int64)
    counts[pc.list_value_length(column).to_numpy() > 0] = (
        column.flatten().to_numpy().reshape(-1, slots)
    )
    return counts


def sparsity_at(path: Path, site: str, tasks: list[str]) -> float:
    """Zeros over entries of a table at a site as paths spell it: mean over some tasks."""
    header, table = read_table(path)
    slots = header["slots"]
    own = [i for i, slot in enumerate(slots) if at_site(slot, site)]
    width = sum(slots[i][2] for i in own)
    shares = []
    for task in tasks:
        rows = table.filter(pc.equal(table["task"], task))
        zeros = entries = 0
        for phase in PHASES:
            zeros += int(zeros_in(rows, phase, len(slots))[:, own].sum())
            entries += width * int(rows[f"{phase}_tokens"].to_numpy().sum())
        shares.append(zeros / entries)
    return sum(shares) / len(shares)


def _check_header(header: dict[str, Any]) -> None:
    """See that a header has the parts that its readers take for granted.

    Raises:
        KeyError, TypeError, ValueError: it has not.
    """
    for tensor, layer, width, *part in header["slots"]:
        named = len(part) < 2 and all(isinstance(one, str) for one in (tensor, *part))
        if not (named and isinstance(layer, int) and isinstance(width, int)):
            raise TypeError("slots are [tensor, layer, width], and the part's name")
    for one in header["tasks"].values():
        if not (isinstance(one["fingerprint"], str) and isinstance(one["result"]["status"], str)):
            raise TypeError("tasks have a fingerprint and a result")


def read_samples(path: Path, slots: list[list[Any]]) -> SampleTable:
    """The table at `path` as a `SampleTable`; an empty one if there is none, or its slots differ.

    Raises:
        AtlasError: damaged, or of a newer format.
    """
    if not path.is_file():
        return SampleTable(slots)
    try:
        header, table = read_table(path)
    except OtherColumns:
        return SampleTable(slots)  # of another release, and as good as none
    if header["slots"] != slots:
        return SampleTable(slots)
    # Parquet has names of its own for the parts of lists and maps.
    table = table.cast(SCHEMA)
    rows = {name: table.filter(pc.equal(table["task"], name)) for name in header["tasks"]}
    return SampleTable(slots, header["tasks"], rows)
