"""Running text for capture: a local file or a Hub data set, read and tokenised in its own order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


def documents(source: dict[str, Any]) -> Iterator[str]:
    """Yield the documents of a text.

    Args:
        source: `{"file": path, "column": ...}` or `{"hub": id, "subset", "revision", "split", "column"}`;
            with `"documents": [first, end]` only those.

    Raises:
        AtlasError: it cannot be read, or has no such field.
    """
    first, end = source.get("documents", (0, None))
    if "file" in source:
        yield from islice(_local(Path(source["file"]), source.get("column", "text")), first, end)
    else:
        yield from islice(_hub(source), first, end)


def _local(path: Path, column: str) -> Iterator[str]:
    if not path.is_file():
        raise AtlasError(f"texts: {path}: no such file")
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _field(path, number, line, column)
    except UnicodeDecodeError as error:
        raise AtlasError(f"texts: {path}: not UTF-8 ({error.reason})") from None


def _field(path: Path, number: int, line: str, column: str) -> str:
    try:
        return str(json.loads(line)[column])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise AtlasError(
            f"texts: {path}: line {number} is not JSON with a field '{column}'"
        ) from None


def _hub(source: dict[str, Any]) -> Iterator[str]:
    from datasets import load_dataset

    column = source.get("column", "text")
    try:
        data = load_dataset(
            source["hub"],
            source.get("subset"),
            split=source.get("split", "train"),
            revision=source.get("revision"),
        )
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AtlasError(f"texts: cannot load the data set {source['hub']}: {reason}") from None
    if column not in data.column_names:
        raise AtlasError(
            f"texts: {source['hub']} has no column '{column}'; it has {', '.join(data.column_names)}"
        )
    yield from data[column]


def token_ids(
    source: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    sequence_length: int,
    bos: bool,
) -> np.ndarray:
    """The first `tokens` tokens of a text, as sequences.

    Documents are joined in order, separated by the EOS token if there is one. Each sequence begins
    with BOS if `bos`; that token counts.

    Returns:
        int64 [sequences, sequence_length]; `tokens` is rounded up to whole sequences.

    Raises:
        AtlasError: the text has fewer tokens.
    """
    import numpy as np

    sequences = -(-tokens // sequence_length)
    body = sequence_length - bos
    wanted = sequences * body
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for document in documents(source):
        stream += tokenizer.encode(document, add_special_tokens=False) + separator
        if len(stream) >= wanted:
            break
    if len(stream) < wanted:
        name = source.get("file") or source["hub"]
        raise AtlasError(
            f"texts: {name} has {len(stream):,} tokens, {wanted:,} are asked for (capture.tokens)"
        )
    rows = np.array(list(islice(stream, wanted)), dtype=np.int64).reshape(sequences, body)
    if bos:
        rows = np.insert(rows, 0, tokenizer.bos_token_id, axis=1)
    return rows


def digest_of(ids: np.ndarray) -> str:
    """Digest of a tokenised text: what the model really sees."""
    return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()
