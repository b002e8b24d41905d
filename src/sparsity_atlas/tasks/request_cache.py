"""Built and tokenised requests on disk, for every node of every model with that tokenizer.

They lie in the user's cache and not among the results: runs in other folders find them as well, and
results stay what was measured. A file bears the digest of all that its content depends on as its name,
and of its own bytes at its start; what does not match is built again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_atlas import cli
from sparsity_atlas.code_version import code_version
from sparsity_atlas.files.whole import cache_folder, canonical, digest, write_atomically
from sparsity_atlas.tasks.choices import Group

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
_KEY, _LABELS = b"sparsity_atlas", b"labels"
_DIGEST_BYTES = hashlib.sha256().digest_size
UNUSED_DAYS = 30
# They make the prompts and their tokens.
PACKAGES = ("lm-eval", "tokenizers", "transformers", "jinja2")


class Row(NamedTuple):
    """One request of lm-eval's; see `SCHEMA`."""

    leaf: str
    kind: str
    doc_id: int
    idx: int
    repeats: int
    arguments: tuple[Any, ...]
    encoding: tuple[list[int], ...]


class Labels(NamedTuple):
    """What a task's documents ask for, whatever a model answers.

    Attributes:
        hashes: of each leaf's documents, as lm-eval logs them.
        chance: accuracy of a guess; None where there is nothing to choose.
        mislabelled: documents whose label is none of their options.
        choices: of leaves of which `Choices` can answer: the right ones.
    """

    hashes: dict[str, list[str]]
    chance: float | None
    mislabelled: int
    choices: dict[str, list[Group]]


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


def read(made_of: dict[str, Any]) -> tuple[list[Row], Labels] | None:
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
    columns = [table[name].to_pylist() for name in SCHEMA.names[:-2]]
    arguments = map(tuple, _loaded(table["arguments"].to_pylist()))
    encodings = _encodings(table["encoding"])
    rows = [Row(*one) for one in zip(*columns, arguments, encodings, strict=True)]
    hashes, chance, wrong, choices = json.loads(table.schema.metadata[_LABELS])
    groups = {name: [Group(*one) for one in some] for name, some in choices.items()}
    return rows, Labels(hashes, chance, wrong, groups)


def _loaded(texts: list[str]) -> list[Any]:
    """What JSON texts say; read as one, since a call for each of them is most of the time otherwise."""
    found: list[Any] = json.loads(f"[{','.join(texts)}]")
    return found


def _column(encodings: list[tuple[list[int], ...]]) -> pa.Array:
    """Lists of tokens as a column; see `_encodings`."""
    parts = [part for one in encodings for part in one]
    counts = [len(part) for part in parts]
    tokens = np.fromiter(itertools.chain.from_iterable(parts), np.int32, sum(counts))
    inner = pa.ListArray.from_arrays(_offsets(counts), pa.array(tokens))
    return pa.ListArray.from_arrays(_offsets([len(one) for one in encodings]), inner)


def _offsets(counts: list[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *counts]), pa.int32())


def _encodings(column: pa.ChunkedArray) -> list[tuple[list[int], ...]]:
    """A column of lists of tokens; as numbers in one piece they are there in a fraction of the time."""
    rows = column.combine_chunks()
    parts = rows.flatten()
    tokens = parts.flatten().to_numpy().tolist()
    ends = [0, *parts.value_lengths().to_numpy().cumsum().tolist()]
    lists = [tokens[start:end] for start, end in itertools.pairwise(ends)]
    ends = [0, *rows.value_lengths().to_numpy().cumsum().tolist()]
    return [tuple(lists[start:end]) for start, end in itertools.pairwise(ends)]


def write(made_of: dict[str, Any], rows: list[Row], labels: Labels) -> None:
    """Keep requests, unless they hold what JSON cannot; forget those that nobody asked for lately."""
    try:
        texts = [json.dumps(row.arguments) for row in rows]
    except TypeError:
        return
    if [tuple(one) for one in _loaded(texts)] != [row.arguments for row in rows]:
        return
    names = [name for name in SCHEMA.names if name not in ("arguments", "encoding")]
    columns = {
        **{name: [getattr(row, name) for row in rows] for name in names},
        "arguments": texts,
        "encoding": _column([row.encoding for row in rows]),
    }
    choices = {
        name: [[one.numbers, one.lengths, one.right] for one in some]
        for name, some in labels.choices.items()
    }
    about = {_KEY: canonical(made_of), _LABELS: canonical([*labels[:-1], choices])}
    table = pa.table(columns, schema=SCHEMA.with_metadata(about))
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
