"""A Parquet table with a header of its own: its format, what was counted, and the tasks that it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.parquet import OtherColumns, read_parquet, write_parquet
from sparsity_atlas.files.whole import FORMAT, canonical

KEY = b"sparsity_atlas"


def write_headed(
    path: Path, header: dict[str, Any], rows: Iterable[pa.Table], *, private: bool = False
) -> None:
    """Write a table atomically; the same contents give the same bytes.

    Args:
        path: the file.
        header: what stands in it beside the format.
        rows: of one schema, at least one table.
        private: see `write_parquet`.
    """
    # One chunk a column, whether the rows were made or read: the bytes follow the chunks.
    table = pa.concat_tables(rows).combine_chunks()
    content = canonical({"format": FORMAT, **header}).encode()
    write_parquet(path, table.replace_schema_metadata({KEY: content}), private=private)


def read_headed(
    path: Path, schema: pa.Schema, check: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], pa.Table]:
    """Header and rows of a table.

    Args:
        path: the file.
        schema: of its rows.
        check: raises KeyError, TypeError or ValueError where a header lacks what its readers want.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """
    table = read_parquet(path, schema)
    try:
        header = json.loads((table.schema.metadata or {})[KEY])
        if header["format"] > FORMAT:
            raise AtlasError(
                f"{path}: format {header['format']} is newer than this release reads ({FORMAT})"
            )
        check(header)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise AtlasError(f"{path}: damaged table ({error}); delete it and run again") from None
    return header, table


@dataclass
class CountTable:
    """What a node counted in its tasks beside the samples: by expert, or by step.

    Attributes:
        slots: what was counted, in the table's own terms.
        tasks: fingerprint of each task.
        rows: for each task its rows; none of a task that failed.
    """

    slots: list[list[Any]]
    tasks: dict[str, str] = field(default_factory=dict)
    rows: dict[str, pa.Table] = field(default_factory=dict)

    def write(self, path: Path, *, private: bool = False) -> None:
        """Write the table atomically; the same contents give the same bytes.

        Args:
            path: the file.
            private: see `write_parquet`.
        """
        order = sorted(self.tasks)
        header = {"slots": self.slots, "tasks": {k: self.tasks[k] for k in order}}
        write_headed(path, header, [self.rows[name] for name in order], private=private)


def read_counts(path: Path, schema: pa.Schema, numbers: str) -> CountTable:
    """Read a table of counts.

    Args:
        path: the file.
        schema: of its rows.
        numbers: what the two numbers of a slot are, which stand behind its layer, part and tensor.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """

    def check(header: dict[str, Any]) -> None:
        for layer, part, tensor, *two in header["slots"]:
            whole = all(isinstance(one, int) and one >= 0 for one in (layer, *two))
            if not (whole and len(two) == 2 and isinstance(part, str) and isinstance(tensor, str)):
                raise TypeError(f"slots are [layer, part, tensor, {numbers}]")
        tasks = header["tasks"]
        if not (isinstance(tasks, dict) and all(isinstance(one, str) for one in tasks.values())):
            raise TypeError("tasks have a fingerprint")

    header, table = read_headed(path, schema, check)
    table = table.replace_schema_metadata(None)
    rows = {name: table.filter(pc.equal(table["task"], name)) for name in header["tasks"]}
    return CountTable(header["slots"], header["tasks"], rows)


def continued(path: Path, slots: list[list[Any]], read: Callable[[Path], CountTable]) -> CountTable:
    """The table at `path`; an empty one if there is none, or other slots or columns are in it.

    Raises:
        AtlasError: damaged, or of a newer format.
    """
    if not path.is_file():
        return CountTable(slots)
    try:
        found = read(path)
    except OtherColumns:
        return CountTable(slots)  # of another release, and as good as none
    return found if found.slots == slots else CountTable(slots)
