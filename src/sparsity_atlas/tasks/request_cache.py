"""Built and tokenised requests on disk, for every node of every model with that tokenizer.

They lie in the user's cache and not among the results: runs in other folders find them as well, and
results stay what was measured. A file bears the digest of all that its content depends on as its name,
and of its own bytes at its start; what does not match is built again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_atlas import cli
from sparsity_atlas.code_version import code_version
from sparsity_atlas.files.whole import cache_folder, canonical, digest, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsity_atlas.lm.journalled import JournalledLM
    from sparsity_atlas.tasks.loaded import LoadedTask

SCHEMA = pa.schema(
    [
        ("leaf", pa.string()),
        ("kind", pa.string()),  # lm-eval's request type
        ("doc_id", pa.int64()),
        ("idx", pa.int64()),  # of the document's requests
        ("repeats", pa.int64()),
        ("arguments", pa.string()),  # JSON
        ("encoding", pa.list_(pa.list_(pa.int32()))),  # as `PromptLM.encode` gives it
    ]
)
_KEY = b"sparsity_atlas"
_DIGEST_BYTES = hashlib.sha256().digest_size
UNUSED_DAYS = 30
# They make the prompts and their tokens.
PACKAGES = ("lm-eval", "tokenizers", "transformers", "jinja2")


@dataclass(frozen=True)
class Row:
    """One request of lm-eval's; see `SCHEMA`."""

    leaf: str
    kind: str
    doc_id: int
    idx: int
    repeats: int
    arguments: tuple[Any, ...]
    encoding: tuple[list[int], ...]


# Of one session's: a large vocabulary is read once, and not for each task.
@functools.lru_cache(maxsize=1)
def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Digest of all that a tokenizer does; None if it does not say, as where code of its own does it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = any(one.__module__.startswith("transformers_modules") for one in type(tokenizer).__mro__)
    if backend is None or own:
        return None
    # What a call set, not what the tokenizer is.
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        content = hashlib.sha256(backend.to_str().encode()).hexdigest()
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
    # What is done before the backend is asked, such as `split_special_tokens`.
    switches = {
        key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int)
    }
    return digest([type(tokenizer).__name__, tokenizer.special_tokens_map, content, switches])


def key(lm: JournalledLM, task: LoadedTask, *, seed: int) -> dict[str, Any] | None:
    """All that a task's requests depend on; None if they cannot be kept.

    Args:
        lm: with the tokenizer and the settings of its prompts.
        task: the task.
        seed: of few-shot draws.
    """
    tokenizer = tokenizer_digest(lm.tokenizer)
    if tokenizer is None:
        return None
    return {
        "tokenizer": tokenizer,
        "prompts": lm.identity(),
        "task": task.identity,
        "seed": seed,
        "code": code_version("tasks.prepared"),
        **_versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _path(made_of: dict[str, Any]) -> Path:
    return cache_folder("requests") / f"{digest(made_of)}.parquet"


def read(made_of: dict[str, Any]) -> list[Row] | None:
    """The requests of that key; None if there are none that are whole."""
    path = _path(made_of)
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    payload = content[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != content[:_DIGEST_BYTES]:
        return None
    table = pq.read_table(pa.BufferReader(payload))
    if table.schema.metadata[_KEY] != canonical(made_of).encode():
        return None
    columns = [table[name].to_pylist() for name in SCHEMA.names]
    return [
        Row(leaf, kind, doc_id, idx, repeats, tuple(json.loads(arguments)), tuple(encoding))
        for leaf, kind, doc_id, idx, repeats, arguments, encoding in zip(*columns, strict=True)
    ]


def write(made_of: dict[str, Any], rows: list[Row]) -> None:
    """Keep requests, unless they hold what JSON cannot; forget those that nobody asked for lately."""
    try:
        texts = [json.dumps(row.arguments) for row in rows]
    except TypeError:
        return
    if any(tuple(json.loads(text)) != row.arguments for text, row in zip(texts, rows, strict=True)):
        return
    columns = {
        **{name: [getattr(row, name) for row in rows] for name in SCHEMA.names},
        "arguments": texts,
    }
    table = pa.table(columns, schema=SCHEMA.with_metadata({_KEY: canonical(made_of)}))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    payload = buffer.getvalue().to_pybytes()
    content = hashlib.sha256(payload).digest() + payload
    path = _path(made_of)
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        _forget(path.parent)
    except OSError as error:
        cli.logger.info("tokenised requests are not kept: %s", error)


def _forget(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.glob("*.parquet"):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
