"""Running text for capture: a local file or a Hub data set, read and tokenised in its own order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.activations.text_files import local_documents
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.hub import Repository

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
        yield from islice(
            local_documents(Path(source["file"]), source.get("column", "text")), first, end
        )
    else:
        yield from islice(_hub(source), first, end)


def pinned(source: dict[str, Any]) -> dict[str, Any]:
    """The source with the commit that its revision is now; a local file as it is.

    Raises:
        AtlasError: the Hub does not give it, and the cache does not know it.
    """
    if "file" in source:
        return source
    return {**source, "revision": _repository(source).commit()}


def _repository(source: dict[str, Any]) -> Repository:
    return Repository("texts", "dataset", source["hub"], source.get("revision", "main"))


def _hub(source: dict[str, Any]) -> Iterator[str]:
    column = source.get("column", "text")
    name, split = source["hub"], source.get("split", "train")
    builder = _repository(source).fetch_data(source.get("subset"))
    try:
        builder.download_and_prepare()
        data = builder.as_dataset(split)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AtlasError(f"texts: cannot load the data set {name}: {reason}") from None
    if column not in data.column_names:
        raise AtlasError(
            f"texts: {name} has no column '{column}'; it has {', '.join(data.column_names)}"
        )
    for document in data[column]:
        if not isinstance(document, str):
            raise AtlasError(f"texts: {name}: column '{column}' is not text")
        yield document


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
