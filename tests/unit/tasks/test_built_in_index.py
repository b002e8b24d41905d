"""The index of lm-eval's tasks is kept, and is what lm-eval itself finds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lm_eval.tasks._index import TaskIndex

from sparsity_atlas.files.whole import cache_folder
from sparsity_atlas.tasks.built_in.index import index_of

FILES = {
    "_base": "dataset_path: json\ntag: [both]\ndoc_to_text: !function helpers.text\n",
    "one.yaml": "include: _base\ntask: one\n",
    "two.yaml": "include: _base\ntask: two\nfewshot_config: {1: a number as a key}\n",
    "group.yaml": "group: all\ntask: [one, {task: two, num_fewshot: 2}]\n",
    "broken.yaml": "task: [\n",
    "notes.md": "# No task\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, content in FILES.items():
        (tasks / name).write_text(content)
    return tasks


def kept() -> list[Path]:
    return list(cache_folder("tasks").glob("*.json"))


def test_what_is_kept_is_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TaskIndex.build([folder])
    assert index_of(folder) == expected
    assert expected["two"].cfg == {
        **{"dataset_path": "json", "tag": ["both"], "task": "two"},
        "doc_to_text": f"{folder}/helpers.text",
        "fewshot_config": {1: "a number as a key"},
    }
    assert expected["both"].tags == {"one", "two"}
    monkeypatch.setattr(TaskIndex, "build", lambda *_: pytest.fail("all files were read again"))
    again = index_of(folder)
    assert again == expected
    assert list(again) == list(expected)


@pytest.mark.parametrize("name", ["one.yaml", "_base"])
def test_an_edit_is_noticed(folder: Path, name: str) -> None:
    index_of(folder)
    (folder / name).write_text(FILES[name].replace("dataset_path: json", "dataset_path: csv") + "#")
    os.utime(folder / name, ns=(1, 1))
    assert index_of(folder) == TaskIndex.build([folder])
    assert len(kept()) == 1  # the one before is gone


def test_a_damaged_one_is_made_again(folder: Path) -> None:
    expected = index_of(folder)
    (path,) = kept()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"csv", b"jso").replace(b"json", b"text"))
    assert index_of(folder) == expected
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_time_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert index_of(folder) == TaskIndex.build([folder])
