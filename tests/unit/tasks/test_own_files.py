"""Built-in tasks on local files, with the configuration of docs/lm-eval.md as it stands there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
import yaml
from markdown_it import MarkdownIt

from checkout import ROOT
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import parse
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.tasks.load import load_tasks
from sparsity_atlas.tasks.local_files import files_digest
from tiny_lm import CHOICE, letter_documents, open_session

# Where lm-eval keeps these tasks: its whole index takes seconds to read.
FOLDERS = {"arc_easy": "arc", "lambada_openai": "lambada", "sciq": "sciq"}


def shown() -> dict[str, Any]:
    """The tasks of the page, as a configuration reads them."""
    page = MarkdownIt().parse((ROOT / "docs/lm-eval.md").read_text(encoding="utf-8"))
    (block,) = (token.content for token in page if "data/lambada.jsonl" in token.content)
    config = parse(
        {
            "models": {"m": {"path": "m"}},
            "criteria": {"topp": {}},
            "texts": {"prose": {"file": "prose.jsonl"}},
            **yaml.safe_load(block),
            "run": [{"models": ["m"]}],
        }
    )
    return json.loads(grid.evaluation_slice(config, "m", tuple(config.tasks)))["tasks"]


def write_data(folder: Path) -> None:
    arc = [
        {
            **{"id": str(number), "question": "a b c", "answerKey": "B"},
            "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
        }
        for number in range(5)
    ]
    datasets.Dataset.from_list(arc).save_to_disk(folder / "arc_easy")
    sciq = {
        **{"question": "a b", "support": "c d", "correct_answer": "a"},
        **{f"distractor{number}": "bcd"[number - 1] for number in (1, 2, 3)},
    }
    for name, rows in (
        ("lambada", [{"text": f"a b c {word}"} for word in "abcd"]),
        ("sciq_train", [{**sciq, "question": f"a {word}"} for word in "abcde"]),
        ("sciq_test", [sciq] * 3),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_s_tasks_run_on_files(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    built_in = Path(lm_eval.tasks.__file__).parent
    tasks = {
        name: {**entry, "include": str(built_in / FOLDERS[name])} for name, entry in shown().items()
    }
    result = evaluate_node(open_session(manifest, tasks), None, tmp_path / "dense")
    found = {name: (task["status"], task.get("items")) for name, task in result["tasks"].items()}
    assert found == {"arc_easy": ("ok", 5), "lambada_openai": ("ok", 4), "sciq": ("ok", 3)}


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("arc_easy", "arc_easy/data-00000-of-00001.arrow"),
        ("lambada_openai", "lambada.jsonl"),
        ("sciq", "sciq_train.jsonl"),
    ],
)
def test_an_edit_of_a_file_is_noticed(
    task: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    override = shown()[task]["override"]
    before = files_digest(None, task, override)
    path = tmp_path / "data" / file
    path.write_bytes(path.read_bytes() + b"\n")
    assert files_digest(None, task, override) != before


def test_members_of_a_group_name_files_of_a_format_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `blimp_dozen_files` has it: the format is no data set of the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    base = {"dataset_path": "none/of-these", "test_split": "test", **CHOICE}
    group: dict[str, Any] = {"group": "both", "dataset_path": "json", "task": []}
    for name in ("one", "two"):
        rows = "".join(json.dumps(row) + "\n" for row in letter_documents())
        (tmp_path / "data" / f"{name}.jsonl").write_text(rows)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **base}))
        files = {"data_files": {"test": f"data/{name}.jsonl"}}
        group["task"].append({"task": name, "dataset_kwargs": files})
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    (task,) = load_tasks({"both": {"include": str(tmp_path)}}, 1).values()
    found = {name: [dict(row) for row in leaf.eval_docs] for name, leaf in task.leaves.items()}
    assert found == dict.fromkeys(("one", "two"), letter_documents())
    before = files_digest(str(tmp_path), "both")
    with (tmp_path / "data/two.jsonl").open("a") as file:
        file.write("\n")
    assert files_digest(str(tmp_path), "both") != before
