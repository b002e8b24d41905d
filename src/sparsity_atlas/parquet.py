"""Parquet tables of ours: written whole and with checksums, and read with the suspicion of a reader."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.store import write_atomically

# What a file may hold once it is unpacked. Run lengths make any number of rows of a few bytes.
MOST_ROWS = 100_000_000
MOST_BYTES = 64 * 2**30


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table atomically; the same contents give the same bytes."""
    write_atomically(
        path,
        lambda temporary: pq.write_table(
            table, temporary, compression="zstd", write_page_checksum=True
        ),
    )


def read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table that `write_parquet` wrote.

    Args:
        path: the file.
        schema: columns and types that it must have.

    Raises:
        AtlasError: missing, damaged, of other columns, or absurdly large.
    """
    if not path.is_file():
        raise AtlasError(f"{path}: no such file")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            about = file.metadata
            groups = (about.row_group(number) for number in range(about.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            if about.num_rows > MOST_ROWS or size > MOST_BYTES:
                raise AtlasError(
                    f"{path}: {about.num_rows:,} rows of {size:,} bytes in all; at most "
                    f"{MOST_ROWS:,} rows and {MOST_BYTES:,} bytes are read"
                )
            if not file.schema_arrow.equals(schema):
                raise AtlasError(
                    f"{path}: expected the columns {', '.join(schema.names)}, found "
                    f"{', '.join(file.schema_arrow.names) or 'none'} or other types; "
                    "delete it and run again"
                )
            return file.read()
    # Arrow's errors are ValueErrors, OSErrors and others of Python's own.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AtlasError(f"{path}: damaged table ({error}); delete it and run again") from None
