"""Prompts and answers beside the samples: every request's own, private, resumed, none where nobody asks."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from checkout import ROOT
from interruptions import products
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.evaluation.texts.text_table import NAME, SCHEMA
from sparsity_atlas.evaluation.texts.text_table import read_table as read_texts
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PAGES, TEXTS = rolling_documents(3), rolling_documents(3, 4)
CHOICES = choice_documents(4)


@pytest.fixture(scope="module")
def model_json(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_manifest(model_folder, tmp_path_factory.mktemp("model") / "model.json")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "choice": write_task(folder, "choice", CHOICES, **CHOICE),
        "pages": write_task(folder, "pages", PAGES, **ROLLING),
        "text": write_task(folder, "text", TEXTS, **GENERATION),
    }


@pytest.fixture(scope="module")
def session(model_json: Path, tasks: dict[str, Any]) -> Session:
    return open_session(model_json, tasks, keep_texts=True)


NODE = Node.make({"rule": "topk"}, "intermediate", "0.5")


def test_every_request_has_its_texts(session: Session, tmp_path: Path) -> None:
    evaluate_node(session, NODE, tmp_path)
    rows = read_texts(tmp_path / NAME).rows
    assert set(rows) == {"choice", "pages", "text"}
    choice = rows["choice"].to_pylist()
    asked = [
        (number, place, document["context"], " " + option, str(document["label"]))
        for number, document in enumerate(CHOICES)
        for place, option in enumerate(document["choices"])
    ]
    keys = ("doc_id", "request", "prompt", "continuation", "target")
    assert [tuple(row[key] for key in keys) for row in choice] == asked
    samples = read_table(tmp_path / "samples.parquet")[1].to_pylist()
    nats = {(row["task"], row["doc_id"]): row["nats"] for row in samples}
    # The likelihoods are those that the samples add up, and the likeliest option is the answer.
    for number in range(len(CHOICES)):
        own = [row["log_likelihood"] for row in choice if row["doc_id"] == number]
        assert -sum(own) == pytest.approx(nats["choice", number])
        (sample,) = (row for row in samples if (row["task"], row["doc_id"]) == ("choice", number))
        right = own.index(max(own)) == CHOICES[number]["label"]
        assert dict(sample["metrics"])["acc,none"] == right
    for row, page in zip(rows["pages"].to_pylist(), PAGES, strict=True):
        assert (row["prompt"], row["continuation"], row["generated"]) == (page["page"], None, None)
        assert -row["log_likelihood"] == pytest.approx(nats["pages", row["doc_id"]])
    for row, page in zip(rows["text"].to_pylist(), TEXTS, strict=True):
        assert (row["kind"], row["prompt"], row["target"]) == ("generate_until", page["page"], "x")
        (made,) = row["generated"]
        assert "e" not in made
        assert dict(row["filtered"]) == {"none": [made]}
        assert row["log_likelihood"] is None
    order = [(row["task"], row["leaf"], row["doc_id"]) for row in samples]
    found = [
        (row["task"], row["leaf"], row["doc_id"])
        for name in sorted(rows)
        for row in rows[name].to_pylist()
    ]
    assert list(dict.fromkeys(found)) == order


def test_nobody_else_may_read_them(session: Session, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        evaluate_node(session, NODE, tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "samples.parquet").stat().st_mode) == 0o644


def test_all_else_is_the_same_without(
    session: Session, model_json: Path, tasks: dict[str, Any], tmp_path: Path
) -> None:
    evaluate_node(session, NODE, tmp_path / "with")
    without = open_session(model_json, tasks)
    evaluate_node(without, NODE, tmp_path / "without")
    kept, bare = (products(tmp_path / name) for name in ("with", "without"))
    assert kept.pop(NAME)
    assert kept == bare
    # Asked for later, the tasks run again for them, and leave all else as it is.
    evaluate_node(session, NODE, tmp_path / "without")
    assert products(tmp_path / "without") == products(tmp_path / "with")


def test_they_are_the_same_after_a_stop(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_node(session, NODE, tmp_path / "whole")
    append, left = session.lm._batch, [4]

    def stop(compute: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return append(compute)

    monkeypatch.setattr(session.lm, "_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_node(session, NODE, tmp_path / "stopped")
    monkeypatch.undo()
    assert not (tmp_path / "stopped/eval.json").exists()
    evaluate_node(session, NODE, tmp_path / "stopped")
    assert products(tmp_path / "stopped") == products(tmp_path / "whole")


def test_documented_columns_are_those_of_the_file() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = text.split("/texts.parquet`\n")[1].split("\n###")[0]
    named = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert named == SCHEMA.names
