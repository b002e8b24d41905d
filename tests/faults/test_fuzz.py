"""Whatever bytes a file of ours or of a user's holds, its reader ends well or in one line."""

from __future__ import annotations

import copy
import json
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsity_atlas.activations.layout import Shape
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.activations.texts import documents
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.headed_table import KEY
from sparsity_atlas.evaluation.kept import BESIDE
from sparsity_atlas.evaluation.samples import SCHEMA, SampleTable, read_table
from sparsity_atlas.files import parquet
from sparsity_atlas.files.journal import Journal
from sparsity_atlas.files.whole import canonical, read_manifest, write_manifest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.report.failures import last_error
from sparsity_atlas.spelling import canonical_level
from sparsity_atlas.tasks import local_files, yaml_tasks
from sparsity_atlas.terms import ACCOUNTS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
# Pieces that parsers stumble over.
TOKENS = [
    b"{",
    b"[",
    b'"',
    b"\0",
    b"\xff\xfe",
    b"NaN",
    b"1e999",
    b"-",
    b"\n",
    b"!!python/x ",
    b"&a *a",
]
TOKENS += [b"null", b"9" * 5000, b"[" * 3000, b"../", b"\xed\xa0\x80", b"true", b"- ", b": "]


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes near `content`: flipped, cut, doubled, with something put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat"])):
            case "flip" if place < len(data):
                data[place] ^= draw(st.integers(1, 255))
            case "cut":
                del data[place:]
            case "drop":
                del data[place : place + draw(st.integers(1, 40))]
            case "insert":
                data[place:place] = draw(st.sampled_from(TOKENS) | st.binary(max_size=8))
            case _:
                data[place:place] = data[place : place + draw(st.integers(1, 200))]
    return bytes(data)


@dataclass(frozen=True)
class Target:
    """A parser: what is drawn, and how it is put before the parser in an empty folder."""

    inputs: st.SearchStrategy
    read: Callable[[Path, Any], object]


BASE: dict[str, Any] = {
    "models": {"small": {"path": "models/small"}, "far": {"hub": "a/b", "revision": "main"}},
    "criteria": {"topp": {"power": 1}},
    "texts": {"prose": {"file": "prose.jsonl"}},
    "tasks": {"pairs": {"limit": 3, "override": {"a": [1]}}},
    "run": [{"models": ["small"], "sites": ["input"], "levels": [0.5, "0.25"]}],
    "bars": [0.99],
    "capture": {"tokens": 10},
}


def places(value: Any) -> list[tuple]:
    """Paths of all that is inside a value."""
    if isinstance(value, dict | list):
        keys = value.keys() if isinstance(value, dict) else range(len(value))
        return [(key, *rest) for key in keys for rest in [(), *places(value[key])]]
    return []


def read_config(_: Path, change: tuple[tuple, Any, str]) -> None:
    place, value, key = change
    data = copy.deepcopy(BASE)
    inside: Any = data
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    if isinstance(inside, dict):
        inside[key] = value
    config = parse(data)
    for curve in grid.curves(config):
        assert ".." not in curve.folder
        assert all(level.isascii() and len(level) < 110 for level in curve.levels)


def read_level(_: Path, value: Any) -> None:
    try:
        level = canonical_level(value)
    except ValueError:
        return
    assert canonical_level(level) == level
    assert set(level) <= set("0123456789.-")


def write(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """Put bytes into a file, then read it."""

    def run(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return run


def sample_manifest(folder: Path) -> bytes:
    write_manifest(folder / "a.json", {"levels": [{"level": "0.5"}], "tasks": {"a": None}})
    return (folder / "a.json").read_bytes()


def sample_table(folder: Path) -> bytes:
    table = SampleTable([["up", 0, 5]])
    table.tasks["a"] = {"fingerprint": "f", "result": {"status": "ok"}}
    row = {"task": "a", "leaf": "a", "doc_id": 0, "doc_hash": "h", "cluster": None}
    row |= {"metrics": [("acc,none", 1.0)], "nats": 0.1, "predicted": 3}
    row |= {"cut_tokens": 0, "windows": 0, "unfinished": 0}
    row |= {f"{account}_tokens": 4 for account in ACCOUNTS}
    row |= {f"{account}_zeros": [1] for account in ACCOUNTS}
    table.rows["a"] = pa.Table.from_pylist([row], SCHEMA)
    table.write(folder / "samples.parquet")
    return (folder / "samples.parquet").read_bytes()


def read_sealed(folder: Path, content: bytes) -> None:
    """A table with a right checksum, so that Arrow gets to read what was changed."""
    import hashlib

    place = content.rfind(parquet._MARK) + len(parquet._MARK)
    zeroed = content[:place] + parquet._EMPTY + content[place + 64 :]
    seal = hashlib.sha256(zeroed).hexdigest().encode()
    path = folder / "samples.parquet"
    path.write_bytes(content[:place] + seal + content[place + 64 :])
    read_table(path)


def read_header(folder: Path, header: Any) -> None:
    """A sample table with another header."""
    table = SCHEMA.empty_table().replace_schema_metadata({KEY: json.dumps(header).encode()})
    parquet.write_parquet(folder / "samples.parquet", table)
    read_table(folder / "samples.parquet")


def read_counts_header(folder: Path, header: Any) -> None:
    """Tables by expert and by step with another header."""
    faults = []
    for table in BESIDE.values():
        empty = table.SCHEMA.empty_table()
        headed = empty.replace_schema_metadata({KEY: json.dumps(header).encode()})
        parquet.write_parquet(folder / table.NAME, headed)
        try:
            table.read_table(folder / table.NAME)
        except AtlasError as fault:
            faults.append(fault)
    if faults:
        raise faults[0]


def journal_lines(*records: Any) -> bytes:
    texts = [canonical(record).encode() for record in records]
    return b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)


def read_journal(path: Path) -> None:
    """What is believed is a beginning of what was written, and the journal goes on from there."""
    journal = Journal(path, {"a": 1})
    before = list(journal.records)
    journal.append("new")
    journal.close()
    assert Journal(path, {"a": 1}).records == [*before, "new"]


def read_crafted_journal(path: Path, lines: list[bytes]) -> None:
    """Lines whose checksums are right, whatever they say."""
    path.joinpath("a").write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(x), x) for x in lines))
    read_journal(path / "a")


def read_task(path: Path) -> None:
    yaml_tasks.entries.cache_clear()
    local_files.files_digest(str(path.parent), "a")


TASK = yaml.safe_dump(
    {
        **{"task": "a", "include": "b.yaml", "group": "g", "dataset_path": "json"},
        "dataset_kwargs": {"data_files": {"test": "a.jsonl"}},
        "list": [{"task": "x"}, 3],
    }
).encode()


def read_model(name: str) -> Callable[[Path, bytes], None]:
    def run(folder: Path, content: bytes) -> None:
        for other in ("config.json", "tokenizer.json"):
            (folder / other).write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
        (folder / name).write_bytes(content)
        checkpoint = Checkpoint(folder, trust_remote_code=True)
        checkpoint.config()
        checkpoint.code_repository()
        checkpoint.digest()

    return run


CONFIG = json.dumps(
    {"model_type": "a", "auto_map": {"AutoConfig": "a/b--c.D"}, "x": [1.5]}
).encode()
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}).encode()


def make_store(folder: Path) -> Path:
    store = ActivationStore(folder / "activations.zarr", writable=True)
    store.create("input", dict.fromkeys((0, 1), Shape(1, 4)), 6, 4, "bfloat16")
    values = np.arange(24, dtype=np.uint16).reshape(6, 4)
    blocks = [
        [store.put("input", layer, start, values[start : start + 4]) for layer in (0, 1)]
        for start in (0, 4)
    ]
    store.finish("input", {"fingerprint": "f", "dtype": "bfloat16", "rows": 4, "blocks": blocks})
    return store.path


def read_store(folder: Path, change: tuple[int, int, bytes]) -> None:
    """A store of which one file was changed: it is refused, or read as it was captured."""
    path = make_store(folder)
    number, place, piece = change
    files = sorted(one for one in path.rglob("*") if one.is_file())
    file = files[number % len(files)]
    content = file.read_bytes()
    place %= len(content) + 1
    file.write_bytes(content[:place] + piece + content[place + len(piece) :])
    store = ActivationStore(path)
    if store.complete("input") is not None:
        store.check("input")


@pytest.mark.parametrize("size", [b"\x80", b"\x7f", b"\0", b"\xff"])
def test_a_chunk_that_gives_its_size_wrongly(tmp_path: Path, size: bytes) -> None:
    """Found by fuzzing: Blosc's header has the size in four bytes, the highest at 7."""
    path = make_store(tmp_path)
    chunk = next(one for one in sorted(path.rglob("c/0/0")))
    content = chunk.read_bytes()
    chunk.write_bytes(content[:7] + size + content[8:])
    store = ActivationStore(path)
    if size == content[7:8]:
        store.check("input")
    else:
        with pytest.raises(AtlasError, match=r"activations\.zarr: damaged"):
            store.check("input")


def targets(folder: Path) -> dict[str, Target]:
    """Every parser, by name."""
    manifest, table = sample_manifest(folder), sample_table(folder)
    journal = journal_lines({"a": 1}, {"zeros": [[1]], "scores": [[[-1.5, True]]]}, [None, "ä"])
    line = json.dumps({"text": "the cat"}).encode() + b"\n"
    change = st.tuples(st.sampled_from(places(BASE)), JSON, st.text(max_size=8))
    return {
        "config": Target(change, read_config),
        "level": Target(JSON | st.decimals() | st.text("0123456789.eE+-_ ٣"), read_level),
        "manifest": Target(mutated(manifest), write("a.json", read_manifest)),
        "table": Target(mutated(table), write("a.parquet", read_table)),
        "sealed table": Target(mutated(table), read_sealed),
        "table header": Target(JSON, read_header),
        "counts header": Target(JSON, read_counts_header),
        "journal": Target(mutated(journal), write("a", read_journal)),
        "crafted journal": Target(
            st.lists(JSON.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=20)).map(
                lambda lines: [b'{"a":1}', *(one.replace(b"\n", b"") for one in lines)]
            ),
            read_crafted_journal,
        ),
        "task": Target(mutated(TASK), write("a.yaml", read_task)),
        "text": Target(
            mutated(line * 3),
            write("a.jsonl", lambda path: list(documents({"file": str(path)}))),
        ),
        "model": Target(mutated(CONFIG), read_model("config.json")),
        "tokenizer": Target(mutated(CONFIG), read_model("tokenizer_config.json")),
        "index": Target(mutated(INDEX), read_model("model.safetensors.index.json")),
        "store": Target(
            st.tuples(
                st.integers(0, 50), st.integers(0, 10_000), st.binary(min_size=1, max_size=4)
            ),
            read_store,
        ),
        "log": Target(
            mutated(b"a\nerror: b\nValueError: c\n"),
            write("a.log", lambda path: _printable(last_error(path))),
        ),
    }


def _printable(text: str) -> None:
    assert text.isprintable()


NAMES = ["config", "level", "manifest", "table", "sealed table", "table header", "journal"]
NAMES += [
    "counts header",
    "crafted journal",
    "task",
    "text",
    "model",
    "tokenizer",
    "index",
    "store",
    "log",
]


def fuzz(name: str, folder: Path, examples: int) -> None:
    """Try one parser on so many inputs."""
    (folder / "samples").mkdir(exist_ok=True)
    target = targets(folder / "samples")[name]
    place = folder / "place"

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def ends_well(content: Any) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            target.read(place, content)
        except AtlasError as error:
            _printable(str(error))

    ends_well()


@pytest.mark.parametrize("name", NAMES)
def test_a_parser_ends_well(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, 40)


@pytest.mark.study
@pytest.mark.parametrize("name", NAMES)
def test_a_parser_ends_well_for_a_minute(name: str, tmp_path: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        fuzz(name, tmp_path, 2000)
