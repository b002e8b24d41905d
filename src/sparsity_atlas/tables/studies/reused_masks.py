"""What prompts' masks are worth behind the prompt, of all curves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.studies.prompt_table import SCHEMA

_KEY = ["model", "criterion", "site"]
PROMPT_REUSE = [*_KEY, *SCHEMA.names]


def reuse_rows(sparsity: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Rows of prompt_reuse.csv, from the prompt_reuse.parquet beside each sparsity.parquet."""
    for path in sparsity:
        key = dict(zip(_KEY, path.parts[-4:-1], strict=True))
        found = read_parquet(path.with_name("prompt_reuse.parquet"), SCHEMA)
        yield from ({**key, **row} for row in found.to_pylist())
