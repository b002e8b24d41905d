"""Built and tokenised requests on disk, for every node of every model with that tokenizer.

They lie in the user's cache and not among the results: runs in other folders find them as well, and
results stay what was measured. What is not whole is built again. Beside them lie the batches that they were
arranged in, for models of the same limits.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_atlas.code_version import code_version
from sparsity_atlas.files.kept_bytes import keep, kept_path, read_kept
from sparsity_atlas.files.whole import canonical, digest
from sparsity_atlas.tasks.choices import Group

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from sparsity_atlas.lm.journalled import JournalledLM
    from sparsity_atlas.lm.work import Encoding
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
# They make the prompts and their tokens.
PACKAGES = ("lm-eval", "tokenizers", "transformers", "jinja2")


class Row(NamedTuple):
    """One request of lm-eval's, without its tokens; see `SCHEMA`."""

    leaf: str
    kind: str
    doc_id: int
    idx: int
    repeats: int
    arguments: tuple[Any, ...]


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
_digests: dict[int, tuple[PreTrainedTokenizerBase, str | None]] = {}


def remember_digest(tokenizer: PreTrainedTokenizerBase, digest: str | None) -> None:
    """Be told what `tokenizer_digest` would find, by whom it was found for the same tokenizer."""
    _digests.clear()
    _digests[id(tokenizer)] = (tokenizer, digest)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Digest of all that a tokenizer does; None if it does not say, as where code of its own does it."""
    if id(tokenizer) not in _digests:
        remember_digest(tokenizer, _tokenizer_digest(tokenizer))
    return _digests[id(tokenizer)][1]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
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
    tokenizer = None if task.unfollowed else tokenizer_digest(lm.tokenizer)
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
    return kept_path("requests", made_of, ".parquet")


def nothing_to_build(lm: JournalledLM, task: LoadedTask, *, seed: int) -> bool:
    """Whether a task's requests are in the cache, or cannot be kept there.

    Args:
        lm: as of `key`.
        task: likewise.
        seed: likewise.
    """
    made_of = None if task.problem else key(lm, task, seed=seed)
    return made_of is None or _path(made_of).is_file()


class Beside:
    """Where batches of a task's requests are kept; a `Keep`."""

    def __init__(self, made_of: dict[str, Any]) -> None:
        """Take the requests' key."""
        self._made_of = made_of

    def _path(self, how: dict[str, Any]) -> Path:
        return kept_path("batches", [self._made_of, how], ".arrow")

    def read(self, how: dict[str, Any]) -> bytes | None:
        """See `Keep`."""
        return read_kept(self._path(how))

    def write(self, how: dict[str, Any], content: bytes) -> None:
        """See `Keep`."""
        keep(self._path(how), content, "batches of requests")


class Known(NamedTuple):
    """What lies in the cache of a task.

    Attributes:
        rows: its requests, without their tokens.
        labels: see `Labels`.
        encodings: gives these tokens, which nobody asks for whose batches are there, too.
    """

    rows: list[Row]
    labels: Labels
    encodings: Callable[[], list[Encoding]]


def read(made_of: dict[str, Any]) -> Known | None:
    """The requests of that key; None if there are none that are whole."""
    payload = read_kept(_path(made_of))
    if payload is None:
        return None
    # Not `read_table`, which first makes a data set of the file: that takes longer than reading it.
    file = pq.ParquetFile(pa.BufferReader(payload))
    about = file.schema_arrow.metadata
    if about[_KEY] != canonical(made_of).encode():
        return None
    table = file.read(columns=SCHEMA.names[:-1], use_threads=False)
    columns = [table[name].to_pylist() for name in SCHEMA.names[:-2]]
    arguments = map(tuple, _loaded(table["arguments"].to_pylist()))
    rows = [Row(*one) for one in zip(*columns, arguments, strict=True)]
    hashes, chance, wrong, choices = json.loads(about[_LABELS])
    groups = {name: [Group(*one) for one in some] for name, some in choices.items()}
    encodings = functools.partial(_encodings, file)
    return Known(rows, Labels(hashes, chance, wrong, groups), encodings)


def _loaded(texts: list[str]) -> list[Any]:
    """What JSON texts say; read as one, since a call for each of them is most of the time otherwise."""
    found: list[Any] = json.loads(f"[{','.join(texts)}]")
    return found


def _column(encodings: list[Encoding]) -> pa.Array:
    """Lists of tokens as a column; see `_encodings`."""
    parts = [part for one in encodings for part in one]
    counts = [len(part) for part in parts]
    tokens = np.fromiter(itertools.chain.from_iterable(parts), np.int32, sum(counts))
    inner = pa.ListArray.from_arrays(_offsets(counts), pa.array(tokens))
    return pa.ListArray.from_arrays(_offsets([len(one) for one in encodings]), inner)


def _offsets(counts: list[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *counts]), pa.int32())


def _encodings(file: pq.ParquetFile) -> list[Encoding]:
    """Their lists of tokens; as numbers in one piece they are there in a fraction of the time."""
    name = SCHEMA.names[-1]
    rows = file.read(columns=[name], use_threads=False)[name].combine_chunks()
    parts = rows.flatten()
    tokens = parts.flatten().to_numpy().tolist()
    ends = [0, *parts.value_lengths().to_numpy().cumsum().tolist()]
    lists = [tokens[start:end] for start, end in itertools.pairwise(ends)]
    ends = [0, *rows.value_lengths().to_numpy().cumsum().tolist()]
    return [tuple(lists[start:end]) for start, end in itertools.pairwise(ends)]


def write(
    made_of: dict[str, Any], rows: list[Row], encodings: list[Encoding], labels: Labels
) -> None:
    """Keep requests, unless they hold what JSON cannot."""
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
        "encoding": _column(encodings),
    }
    choices = {
        name: [[one.numbers, one.lengths, one.right] for one in some]
        for name, some in labels.choices.items()
    }
    about = {_KEY: canonical(made_of), _LABELS: canonical([*labels[:-1], choices])}
    table = pa.table(columns, schema=SCHEMA.with_metadata(about))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    keep(_path(made_of), buffer.getvalue().to_pybytes(), "tokenised requests")
