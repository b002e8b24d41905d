"""lm-eval runs our model under its own name, and gets what the pipeline gets."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from sparsity_atlas import harness
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluate import Node, evaluate_node
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """One task of each kind."""
    folder = tmp_path / "tasks"
    return {
        "choice": write_task(folder, "choice", choice_documents(), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(), **ROLLING),
        "words": write_task(folder, "words", rolling_documents(5, 4), **GENERATION),
    }


@pytest.mark.parametrize("level", [None, "0.6"])
@pytest.mark.parametrize("task", ["choice", "pages", "words"])
def test_simple_evaluate_gives_the_node_s_numbers(
    manifest: Path, model_folder: Path, tasks: dict, tmp_path: Path, task: str, level: str | None
) -> None:
    node = Node.make({"rule": "topp", "power": 2}, "all_inputs", level) if level else None
    session = open_session(manifest, {task: tasks[task]})
    ours = evaluate_node(session, node, tmp_path / "node")["tasks"][task]
    arguments = f"pretrained={model_folder},device=cpu"
    if level:
        arguments += f",criterion=topp,power=2,site=all_inputs,level={level}"
    theirs = lm_eval.simple_evaluate(
        model="sparsity-atlas",
        model_args=arguments,
        tasks=[task],
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    for key, value in ours["scores"][task].items():
        if value is not None:
            assert theirs["results"][task][key] == value
    assert theirs["config"]["sparsity"] == ours["sparsity"]
    assert theirs["config"]["level"] == (float(level) if level else None)


def test_the_command(
    model_folder: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the index of lm-eval's own tasks, which takes seconds.
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    arguments = f"pretrained={model_folder},criterion=topk,site=intermediate,level=0.5"
    command = [
        *("harness", "run", "--model", "sparsity-atlas", "--model_args", arguments),
        *("--tasks", "choice", "--include_path", str(tmp_path / "tasks")),
        *("--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(sys, "argv", command)
    harness.main()
    (path,) = (tmp_path / "out").rglob("results_*.json")
    content = json.loads(path.read_text())
    assert content["config"]["criterion"] == "topk"
    assert content["config"]["sparsity"]["intermediate"]["total"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "topp"}, "criterion=topp: site and level are missing"),
        ({"criterion": "topp", "site": "input", "level": 2}, "levels: 2 is out of range"),
        ({"criterion": "topp", "site": "nowhere", "level": 0.5}, "no site 'nowhere'"),
        ({"batch_size": "auto"}, "batch_size: expected a number, found 'auto'"),
        ({"pretrained": "/nowhere/at/all"}, "nowhere"),
    ],
)
def test_what_is_refused(model_folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        harness.HarnessLM(**{"pretrained": str(model_folder), "device": "cpu", **arguments})
