"""Plain English text in, a list of lightly normalised paragraphs out."""

from __future__ import annotations

import lzma
import re
from pathlib import Path

from sparsity_atlas.errors import AtlasError

PARAGRAPH_BREAK = "\n\n"

_BLANK_LINES = re.compile(r"\n\s*\n")
# One spelling of each quotation mark: the tasks and most of the corpus use the straight one.
_CHARACTERS = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "\ufeff": None})


def read_text(path: Path) -> str:
    """Read a UTF-8 text, plain or xz-compressed (by its suffix `.xz`).

    AtlasError if the file is missing, is no xz stream, or is not UTF-8.
    """
    if not path.is_file():
        raise AtlasError(f"{path}: no such file, expected a text (.txt or .txt.xz)")
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as stream:
                return stream.read()
        return path.read_text(encoding="utf-8")
    except (lzma.LZMAError, EOFError) as error:
        raise AtlasError(f"{path}: not a whole xz file ({error})") from error
    except UnicodeDecodeError as error:
        raise AtlasError(f"{path}: not UTF-8 text ({error})") from error


def read_hub(dataset_id: str, column: str) -> str:
    """Read column `column` of the `train` split of a Hub data set, one document a row."""
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset_id, split="train")
    except (OSError, ValueError) as error:
        raise AtlasError(
            f"--corpus-hub {dataset_id}: cannot be loaded ({error}), "
            "expected a data set with a train split"
        ) from error
    if column not in rows.column_names:
        raise AtlasError(
            f"--corpus-hub {dataset_id}: no column {column!r}, found {', '.join(rows.column_names)}"
        )
    return PARAGRAPH_BREAK.join(rows[column])


def paragraphs(text: str) -> list[str]:
    """Split at blank lines; inside a paragraph every run of whitespace becomes one space.

    Curly quotes become straight ones and byte-order marks go. No paragraph is empty.
    """
    pieces = (" ".join(piece.split()) for piece in _BLANK_LINES.split(text.translate(_CHARACTERS)))
    return [piece for piece in pieces if piece]
