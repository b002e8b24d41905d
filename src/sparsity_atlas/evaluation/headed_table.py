"""A Parquet table with a header of its own: its format, what was counted, and the tasks that it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.parquet import read_parquet, write_parquet
from sparsity_atlas.files.whole import FORMAT, canonical

KEY = b"sparsity_atlas"


def write_headed(path: Path, header: dict[str, Any], rows: Iterable[pa.Table]) -> None:
    """Write a table atomically; the same contents give the same bytes.

    Args:
        path: the file.
        header: what stands in it beside the format.
        rows: of one schema, at least one table.
    """
    # One chunk a column, whether the rows were made or read: the bytes follow the chunks.
    table = pa.concat_tables(rows).combine_chunks()
    content = canonical({"format": FORMAT, **header}).encode()
    write_parquet(path, table.replace_schema_metadata({KEY: content}))


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
