"""Files are whole or absent, and the code version follows every file that it stands for."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsity_atlas import code_version
from sparsity_atlas.commands import COMMANDS
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.samples import SCHEMA, SampleTable, read_samples, read_table
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.files.whole import (
    canonical,
    digest,
    machine,
    read_manifest,
    write_atomically,
    write_manifest,
)
from sparsity_atlas.terms import ACCOUNTS


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_a_dead_writer_left_is_swept(tmp_path: Path) -> None:
    """A process number says nothing about a writer on another machine."""
    names = {
        "dead": f".a.4194304@{machine()}.tmp",
        "alive": f".a.{os.getppid()}@{machine()}.tmp",
        "elsewhere": ".a.4194304@elsewhere.tmp",
        "another file's": f".ab.4194304@{machine()}.tmp",
    }
    for name in names.values():
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a", Path.touch)
    assert {path.name for path in tmp_path.iterdir()} == {"a", *names.values()} - {names["dead"]}


def test_manifests(tmp_path: Path) -> None:
    path = tmp_path / "new" / "manifest.json"
    write_manifest(path, {"number": 0.1, "text": "ä"})
    assert read_manifest(path) == {"format": 1, "number": 0.1, "text": "ä"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(path, {"number": float("nan")})
    assert read_manifest(path)["number"] == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"a\.json: no such file"),
        ("{", r"a\.json: damaged manifest .*; delete it and run again"),
        ("[]", r"a\.json: not a manifest of Sparsity Atlas"),
        ("{}", r"a\.json: not a manifest of Sparsity Atlas"),
        ('{"format": 2}', r"a\.json: format 2 is newer than this release reads \(1\)"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AtlasError, match=message):
        read_manifest(path)


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    assert canonical({"b": 1, "a": None}) == '{"a":null,"b":1}'


# Sample tables


def sample(task: str, item: int) -> dict:
    return {
        **{"task": task, "leaf": task, "doc_id": item, "doc_hash": "h", "cluster": None},
        **{"metrics": [("acc,none", 1.0)], "nats": 0.1, "predicted": 3},
        **{"cut_tokens": 0, "windows": 0, "unfinished": 0},
        **{f"{account}_tokens": 4 for account in ACCOUNTS},
        **{f"{account}_zeros": [1, 2] for account in ACCOUNTS},
    }


def table(*tasks: str) -> SampleTable:
    made = SampleTable([["up", 0, 5], ["up", 1, 5]])
    for name in tasks:
        made.tasks[name] = {"fingerprint": name, "result": {"status": "ok"}}
        samples = [sample(name, item) for item in range(3)]
        made.rows[name] = pa.Table.from_pylist(samples, SCHEMA)
    return made


def test_sample_tables_have_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    table("a", "b").write(tmp_path / "1")
    table("b", "a").write(tmp_path / "2")
    again = read_samples(tmp_path / "1", [["up", 0, 5], ["up", 1, 5]])
    again.write(tmp_path / "3")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    assert again.tasks == table("a", "b").tasks


def test_tables_of_other_slots_are_not_continued(tmp_path: Path) -> None:
    table("a").write(tmp_path / "1")
    assert read_samples(tmp_path / "1", [["up", 0, 6], ["up", 1, 6]]).tasks == {}
    assert read_samples(tmp_path / "none", []).tasks == {}


def test_tables_with_other_columns_are_not_continued(tmp_path: Path) -> None:
    table("a").write(tmp_path / "1")
    write_parquet(tmp_path / "1", pq.read_table(tmp_path / "1").drop(["unique_tokens"]))
    assert read_samples(tmp_path / "1", [["up", 0, 5], ["up", 1, 5]]).tasks == {}


@pytest.mark.parametrize("end", [0, 4, 300, -1])
def test_damaged_tables(tmp_path: Path, end: int) -> None:
    path = tmp_path / "samples.parquet"
    table("a").write(path)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(AtlasError, match=r"samples\.parquet: damaged table"):
        read_table(path)


# Code versions


def forget() -> None:
    """What a process remembers of the sources."""
    for function in vars(code_version).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that may be edited."""
    copy = tmp_path / code_version.PACKAGE.name
    shutil.copytree(code_version.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_version, "PACKAGE", copy)
    forget()
    yield copy
    forget()


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("evaluation/evaluate.py", {"evaluate", "search"}),
        # Imported inside a function, or by another module.
        ("lm/model.py", {"evaluate", "search"}),
        ("sparsify/attach.py", {"evaluate", "search", "output_error"}),
        ("kernels/cpu_row.py", {"evaluate", "search", "output_error"}),
        ("kernels/cuda.py", {"evaluate", "search", "output_error"}),
        ("kernels/definition.py", {"evaluate", "search", "output_error"}),
        ("kernels/cpu_masks.py", {"evaluate", "search", "output_error"}),
        ("kernels/cuda_masks.py", {"evaluate", "search", "output_error"}),
        # In CUDA C++.
        ("kernels/share.cu", {"evaluate", "search", "output_error"}),
        ("kernels/share_device.cu", {"evaluate", "search", "output_error"}),
        ("evaluation/next_level.py", {"search"}),
        ("activations/store.py", {"capture", "metrics", "output_error"}),
        ("curves/curve.py", {"curve"}),
        ("curves/critical.py", {"curve"}),
        ("criteria/base.py", {"evaluate", "search", "output_error"}),
        # One criterion is the matter of its own nodes; messages are nobody's.
        ("criteria/built_in/topp.py", set()),
        ("config/schema.py", set()),
        ("cli.py", set()),
    ],
)
def test_an_edit_changes_the_stages_it_is_part_of(
    package: Path, file: str, stages: set[str]
) -> None:
    names = ("evaluate", "search", "capture", "metrics", "output_error", "curve")
    before = {name: code_version.code_version(name) for name in names}
    with (package / file).open("a") as source:
        source.write("\n# edited\n")
    forget()
    after = {name: code_version.code_version(name) for name in names}
    assert {name for name in names if before[name] != after[name]} == stages


def test_a_criterion_s_file_is_part_of_its_version(package: Path) -> None:
    topp, topk = (str(package / "criteria/built_in" / f"{name}.py") for name in ("topp", "topk"))
    before = (
        code_version.code_version("evaluate", topp),
        code_version.code_version("evaluate", topk),
    )
    with open(topp, "a") as source:
        source.write("\n# edited\n")
    forget()
    after = code_version.code_version("evaluate", topp), code_version.code_version("evaluate", topk)
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_no_file_is_part_of_nothing(package: Path) -> None:
    """Each kernel is part of some version: an import by a name that is put together would not be seen."""
    rules = [str(one) for one in (package / "criteria/built_in").glob("*.py")]
    seen = {code_version._content(name) for name in code_version._closure("evaluate")}
    for rule in rules:
        for name in code_version._imports(Path(rule)):
            seen |= {code_version._content(one) for one in code_version._closure(name)}
    everything = b"".join(seen)
    files = [file for file in (package / "kernels").rglob("*") if file.is_file()]
    assert len(files) > 15
    for file in files:
        assert file.read_bytes() in everything, file.name


@pytest.mark.parametrize(
    "statement",
    [
        "from sparsity_atlas.zoo import train",
        "import sparsity_atlas.zoo.train as other",
        "from sparsity_atlas.zoo import (  # (and others)\n    train,\n)",
        "from sparsity_atlas.zoo \\\n    import train",
        "import json, sparsity_atlas.zoo.train",
        "def late():\n    from sparsity_atlas.zoo import train",
        "if True: from sparsity_atlas.zoo import train",
        "'''Is told.'''; from sparsity_atlas.zoo import train",
    ],
)
def test_an_import_is_found_however_it_is_written(package: Path, statement: str) -> None:
    rule = package / "criteria/built_in/topk.py"
    rule.write_text(f"{rule.read_text()}\n{statement}\n")
    before = code_version.code_version("evaluate", str(rule))
    with (package / "zoo/train.py").open("a") as source:
        source.write("\n# edited\n")
    forget()
    assert code_version.code_version("evaluate", str(rule)) != before


def test_what_is_parsed_alone_is_what_the_files_import(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    found = {stage: code_version._closure(stage) for stage in COMMANDS}
    forget()
    monkeypatch.setattr(code_version, "_PLAIN", re.compile(b"(?!)"))  # every file is parsed
    assert {stage: code_version._closure(stage) for stage in COMMANDS} == found
    forget()
