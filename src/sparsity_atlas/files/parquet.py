"""Parquet tables of ours: whole, with a checksum, and read with suspicion.

Parquet's own checksums leave out its footer, where a flipped bit drops rows in silence. So the file has
its SHA-256 in its metadata, computed with zeros in that place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import write_atomically

# What a file may hold once it is unpacked. Run lengths make any number of rows of a few bytes.
MOST_ROWS = 100_000_000
MOST_BYTES = 64 * 2**30

_MARK = b"sparsity-atlas-sha256:"
_EMPTY = b"0" * 64


class OtherColumns(AtlasError):
    """A whole table that is not of the schema that was asked for."""


def write_parquet(path: Path, table: pa.Table, *, private: bool = False) -> None:
    """Write a table atomically; the same contents give the same bytes.

    Args:
        path: the file.
        table: what it holds.
        private: nobody but the user may read it.
    """

    def write(temporary: Path) -> None:
        if private:
            temporary.touch(mode=0o600)  # before anything stands in it
        with pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"checksum": (_MARK + _EMPTY).decode()})
        content = temporary.read_bytes()
        with temporary.open("r+b") as file:
            file.seek(content.rindex(_MARK) + len(_MARK))
            file.write(hashlib.sha256(content).hexdigest().encode())

    write_atomically(path, write)


def read_parquet(path: Path, *schemas: pa.Schema) -> pa.Table:
    """Read a table that `write_parquet` wrote.

    Args:
        path: the file.
        schemas: columns and types that it must have: those of any of these.

    Raises:
        OtherColumns: of other columns.
        AtlasError: missing, damaged, or absurdly large.
    """
    if not path.is_file():
        raise AtlasError(f"{path}: no such file")
    content = path.read_bytes()
    _check(path, content)
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            about = file.metadata
            groups = (about.row_group(number) for number in range(about.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            if about.num_rows > MOST_ROWS or size > MOST_BYTES:
                raise AtlasError(
                    f"{path}: {about.num_rows:,} rows of {size:,} bytes in all; at most "
                    f"{MOST_ROWS:,} rows and {MOST_BYTES:,} bytes are read"
                )
            if not any(file.schema_arrow.equals(schema) for schema in schemas):
                raise OtherColumns(
                    f"{path}: expected the columns {', '.join(schemas[0].names)}, found "
                    f"{', '.join(file.schema_arrow.names) or 'none'} or other types; "
                    "delete it and run again"
                )
            return file.read(
                use_threads=False
            )  # a job has one core; threads cost more than they bring
    # Arrow's errors are ValueErrors, OSErrors and others of Python's own.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AtlasError(f"{path}: damaged table ({error}); delete it and run again") from None


def _check(path: Path, content: bytes) -> None:
    """Compare a file with its checksum.

    Raises:
        AtlasError: it has none, or another one.
    """
    start = content.rfind(_MARK) + len(_MARK)
    end = start + len(_EMPTY)
    found = hashlib.sha256(content[:start] + _EMPTY + content[end:]).hexdigest().encode()
    if content[start:end] != found:
        raise AtlasError(
            f"{path}: damaged table (its checksum is not that of its content); "
            "delete it and run again"
        )
