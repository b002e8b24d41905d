"""Local files with text: which kinds are read, and their documents in order.

.txt, .jsonl and .ndjson are read here, line by line; other tables by `datasets`, as a stream, so that a
large file is not converted as a whole. Any of them may be compressed.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsity_atlas.errors import AtlasError

# Characters of a document; the tokeniser takes one at a time, in many times its size.
LONGEST = 64 * 2**20
LINES = (".jsonl", ".ndjson")
# Module of `datasets` that reads a table, and what it is told.
_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
# Module that opens a compressed file as text. The last one is no part of Python.
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}


def kind_of(path: Path) -> tuple[str, str | None]:
    """What a file is by its name, whatever the case: `.jsonl`, and `.gz` or None.

    Raises:
        AtlasError: nothing that is read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else None
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".txt", *LINES, *_TABLES):
        read = ", ".join((".txt", *LINES, *_TABLES))
        raise AtlasError(
            f"texts: {path}: expected {read}, which may be compressed ({', '.join(_COMPRESSED)}), "
            f"found {path.suffix or 'no suffix'}"
        )
    if compressed == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise AtlasError(f"texts: {path}: .zst needs a package: pip install zstandard")
    return kind, compressed


def local_documents(path: Path, column: str) -> Iterator[str]:
    """The documents of a file: a whole .txt is one, a table has one a row.

    Raises:
        AtlasError: there is no such file, it is not of the kind that its name says, or not text.
    """
    if not os.path.isfile(path):
        what = "a folder; name one file" if os.path.isdir(path) else "no such file"
        raise AtlasError(f"texts: {path}: {what}")
    kind, compressed = kind_of(path)
    if kind in _TABLES:
        yield from _table(path, kind, column)
        return
    module = importlib.import_module(_COMPRESSED[compressed]) if compressed else None
    # A byte-order mark is no part of a text.
    opened = (module.open if module else open)(path, "rt", encoding="utf-8-sig")
    try:
        with opened as file:
            if kind == ".txt":
                yield _short(path, 1, file.read(LONGEST + 1))
                return
            lines = iter(lambda: file.readline(LONGEST + 1), "")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field(path, number, _short(path, number, line), column)
    except UnicodeDecodeError as error:
        raise AtlasError(f"texts: {path}: not UTF-8 ({error.reason})") from None
    except _unpacking_errors(module) as error:
        if module is None:
            raise
        raise AtlasError(f"texts: {path}: cannot be unpacked ({error})") from None


def _unpacking_errors(module: Any) -> tuple[type[Exception], ...]:
    """What reading raises by a module of `_COMPRESSED`: Python's own errors, and some of the module's."""
    import zlib

    names = ("LZMAError", "ZstdError")
    own = (getattr(module, name) for name in names if hasattr(module, name))
    return (EOFError, OSError, zlib.error, *own)


def _short(path: Path, number: int, text: str) -> str:
    if len(text) > LONGEST:
        raise AtlasError(
            f"texts: {path}: line {number} on: a document of more than {LONGEST:,} characters; "
            "give documents, one a line of a .jsonl file"
        )
    return text


def _field(path: Path, number: int, line: str, column: str) -> str:
    try:
        text = json.loads(line)[column]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise AtlasError(f"texts: {path}: line {number} is not JSON with a text in '{column}'")
    return _whole(path, f"line {number}", text)


def _whole(path: Path, place: str, text: str) -> str:
    """A text that can be written: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise AtlasError(
            f"texts: {path}: {place}: half of a surrogate pair (\\ud800 to \\udfff), which is no text"
        ) from None
    return text


def _table(path: Path, kind: str, column: str) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    module, options = _TABLES[kind]
    if module == "csv":
        # As it stands: pandas takes `NA` for nothing, and digits for numbers.
        options = {**options, "converters": {column: str}, "keep_default_na": False}
    # `datasets` takes a name for a pattern.
    files = glob.escape(str(path.absolute()))
    try:
        data = load_dataset(module, data_files=files, split="train", streaming=True, **options)
        for number, row in enumerate(data, 1):
            # What pandas makes of cells for which the header has no name, shifting all others.
            if any(name.startswith("__index_level_") for name in row):
                raise AtlasError(f"texts: {path}: row {number} has more cells than the header")
            if number == 1 and column not in row:
                raise AtlasError(f"texts: {path} has no column '{column}'; it has {', '.join(row)}")
            text = row.get(column)
            if not isinstance(text, str):
                raise AtlasError(f"texts: {path}: row {number} has no text in '{column}'")
            yield _whole(path, f"row {number}", _short(path, number, text))
    except StopIteration:  # of `datasets`, where a file is empty
        return
    except (DatasetsError, OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AtlasError(f"texts: {path}: cannot be read as {kind[1:]}: {reason}") from None
