"""Tasks are found with their files, refused in one line, and known by what they really contain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsity_atlas import task_files
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.task_files import files_digest
from sparsity_atlas.tasks import load_tasks
from tiny_lm import CHOICE, letter_documents, write_task

HELPERS = """
def shout(text):
    return text.upper()


def text(document):
    return shout(document["context"])


def all_of(documents):
    return documents


def mean(items):
    return sum(items) / len(items)
"""


def relative_task(folder: Path, name: str = "letters", **config: Any) -> dict[str, Any]:
    """A task whose data file is named as it lies beside the YAML."""
    entry = write_task(folder, name, letter_documents(), **CHOICE)
    path = folder / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    content["dataset_kwargs"] = {"data_files": {"test": f"{name}.jsonl"}}
    path.write_text(yaml.safe_dump({**content, **config}))
    return entry


def identity(entry: dict[str, Any], seed: int = 1234, name: str = "letters") -> dict[str, Any]:
    return load_tasks({name: entry}, seed)[name].identity


def test_data_beside_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = relative_task(tmp_path / "tasks")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    task = load_tasks({"mine": entry}, 1)["mine"]
    assert list(task.leaves) == ["letters"]
    assert [dict(one) for one in task.leaves["letters"].eval_docs] == letter_documents()


def test_the_name_in_the_configuration_is_the_task_by_default(tmp_path: Path) -> None:
    entry = relative_task(tmp_path)
    del entry["task"]
    assert load_tasks({"letters": entry}, 1)["letters"].lm_eval_name == "letters"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "leters"}, r"tasks\.mine: lm-eval has no task 'leters'; close names: letters"),
        ({"include": "nowhere"}, r"tasks\.mine: include: nowhere: no such folder"),
        (
            {"override": {"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}},
            r"tasks\.mine: cannot load 'letters': .*none\.jsonl",
        ),
        (
            {"override": {"test_split": "exam"}},
            r"tasks\.mine: cannot load 'letters': .*exam",
        ),
    ],
)
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    entry = relative_task(tmp_path / "tasks")
    # lm-eval's own catalogue is read where a name is not found, which takes seconds.
    from sparsity_atlas import tasks

    manager = tasks._manager
    monkeypatch.setattr(
        tasks, "_manager", lambda include, *, defaults: manager(include, defaults=False)
    )
    with pytest.raises(AtlasError, match=message) as caught:
        load_tasks({"mine": {**entry, **change}}, 1)
    assert "\n" not in str(caught.value)


def test_identity_is_that_of_the_documents_in_use(tmp_path: Path) -> None:
    entry = relative_task(tmp_path)
    limited = {**entry, "limit": 4}
    before, first_four = identity(entry), identity(limited)
    assert before != first_four
    assert identity(entry) == before
    path = tmp_path / "letters.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[-1].replace("label", "label")]))
    assert identity(entry) == before
    edited = json.loads(lines[7])
    edited["label"] = (edited["label"] + 1) % 4
    lines[7] = json.dumps(edited) + "\n"
    path.write_text("".join(lines))
    assert identity(entry) != before
    # The eighth document is none of the first four.
    assert identity(limited) == first_four


def test_identity_follows_shots_seed_and_override(tmp_path: Path) -> None:
    entry = relative_task(tmp_path, fewshot_split="test", num_fewshot=2)
    variants = [
        identity(entry),
        identity(entry, seed=1),
        identity({**entry, "num_fewshot": 1}),
        identity({**entry, "override": {"doc_to_text": "{{context}}?"}}),
        identity({**entry, "cluster": "context"}),
    ]
    assert len({json.dumps(one, sort_keys=True) for one in variants}) == len(variants)


def test_identity_of_python_helpers(tmp_path: Path) -> None:
    relative_task(tmp_path)
    path = tmp_path / "letters.yaml"
    content = yaml.safe_load(path.read_text())
    for key in ("doc_to_text", "metric_list"):
        del content[key]
    path.write_text(
        yaml.safe_dump(content)
        + "doc_to_text: !function helpers.text\n"
        + "process_docs: !function helpers.all_of\n"
        + "metric_list: [{metric: acc, aggregation: !function helpers.mean, "
        + "higher_is_better: true}]\n"
    )
    (tmp_path / "helpers.py").write_text(HELPERS)
    program = (
        "import json, sys; from sparsity_atlas.tasks import load_tasks;"
        f"entry = {{'task': 'letters', 'include': {str(tmp_path)!r}}};"
        "print(json.dumps(load_tasks({'letters': entry}, 1)['letters'].identity))"
    )

    def in_another_process() -> str:
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        return run.stdout.decode()

    first = in_another_process()
    # No address of a function in it: another process finds the same.
    assert in_another_process() == first
    (tmp_path / "helpers.py").write_text(HELPERS.replace("upper", "lower"))
    assert in_another_process() != first


# Without lm-eval


@pytest.fixture
def group(tmp_path: Path) -> Path:
    """A group of two tasks, one of which includes a common file and has a helper."""
    relative_task(tmp_path, "one")
    relative_task(tmp_path, "two")
    path = tmp_path / "two.yaml"
    content = yaml.safe_load(path.read_text())
    del content["doc_to_text"]
    path.write_text(
        yaml.safe_dump(content) + "include: common\ndoc_to_text: !function helpers.text\n"
    )
    (tmp_path / "common").write_text("output_type: multiple_choice\n")
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, {task: two}]\n")
    (tmp_path / "stranger.yaml").write_text("task: stranger\n")
    return tmp_path


def digest_of(folder: Path, name: str) -> str:
    task_files._catalogue.cache_clear()
    return files_digest(str(folder), name)


@pytest.mark.parametrize(
    ("file", "tasks"),
    [
        ("one.yaml", {"one", "both"}),
        ("one.jsonl", {"one", "both"}),
        ("two.yaml", {"two", "both"}),
        ("two.jsonl", {"two", "both"}),
        ("common", {"two", "both"}),
        ("helpers.py", {"two", "both"}),
        ("both.yaml", {"both"}),
        ("stranger.yaml", set()),
    ],
)
def test_a_file_changes_the_tasks_it_is_part_of(group: Path, file: str, tasks: set[str]) -> None:
    before = {name: digest_of(group, name) for name in ("one", "two", "both")}
    assert all(before.values())
    path = group / file
    path.write_text(path.read_text() + "\n\n")
    after = {name: digest_of(group, name) for name in before}
    assert {name for name in before if before[name] != after[name]} == tasks


def test_tasks_of_lm_eval_s_own_have_no_files(group: Path) -> None:
    assert digest_of(group, "hellaswag") == ""
    assert files_digest(None, "hellaswag") == ""
