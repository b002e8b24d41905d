"""Rows that make room for waiting prompts give what transformers' own loop gives, to the last zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.lm.continuous import engine
from sparsity_atlas.lm.continuous.generator import Generator
from tiny_lm import GENERATION, open_session, rolling_documents, write_task

# Beside the rows of a batch.
NODES = [
    (None, 1),
    (("topk", "intermediate", "0.45"), 3),
    (("topp", "all_inputs", "0.8"), 16),
    (("random", "gate", "0.7"), 5),
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Texts that end soon, late, and at their budget, by a string or a token."""
    folder = tmp_path_factory.mktemp("tasks")
    strings = {"short": ["e", "\n"], "long": ["\n\n"], "pair": ["the", "r"]}
    made = {}
    for number, (name, stops) in enumerate(strings.items()):
        options = GENERATION["generation_kwargs"] | {"until": stops, "max_gen_toks": 5 + 9 * number}
        made[name] = write_task(
            folder,
            name,
            rolling_documents(11, number),
            **GENERATION | {"generation_kwargs": options},
        )
    return made


def on_a_gpu(patch: pytest.MonkeyPatch) -> list[int]:
    """Have the CPU generate as a GPU does, but for the recording.

    Returns:
        Batches that were generated so.
    """
    patch.setattr("sparsity_atlas.lm.model.DEVICES", {"cpu"})
    batches: list[int] = []
    texts = Generator.texts

    def spy(generator: Generator, number: int) -> Any:
        found = texts(generator, number)
        batches.append(-1 if found is None else number)
        return found

    patch.setattr(Generator, "texts", spy)
    return batches


def outcome(session: Session, node: Node | None, folder: Path) -> tuple[dict, list[dict]]:
    result = evaluate_node(session, node, folder)
    assert result["status"] == "ok"
    for task in result["tasks"].values():
        del task["largest"]  # follows the batch size
    return result["tasks"], read_table(folder / "samples.parquet")[1].to_pylist()


@pytest.mark.parametrize(("made", "size"), NODES)
def test_texts_and_counts_are_those_of_transformers_own_loop(
    tasks: dict,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: tuple[str, str, str] | None,
    size: int,
) -> None:
    node = Node.make({"rule": made[0]}, *made[1:]) if made else None
    expected = outcome(open_session(manifest, tasks, batch_size=16), node, tmp_path / "own")
    batches = on_a_gpu(monkeypatch)
    found = outcome(open_session(manifest, tasks, batch_size=size), node, tmp_path / "found")
    assert found == expected
    assert len(batches) == len(tasks) * -(-11 // size)
    assert -1 not in batches
    ended = [row["unfinished"] for row in expected[1]]
    assert 0 < sum(ended) < len(ended)


def test_a_row_that_ends_makes_room(
    tasks: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    begun: list[tuple[int, int]] = []
    begin = engine.Engine._begin

    def spy(running: engine.Engine, waiting: Any) -> Any:
        busy = sum(text is not None for text in running._rows)
        before = len(waiting)
        read = begin(running, waiting)
        begun.append((busy, before - len(waiting)))
        return read

    monkeypatch.setattr(engine.Engine, "_begin", spy)
    outcome(open_session(manifest, {"pair": tasks["pair"]}, batch_size=3), None, tmp_path)
    assert sum(count for _, count in begun) == 11
    # Some begin beside rows that go on.
    assert any(busy > 0 for busy, _ in begun)


def test_a_run_that_was_cut_goes_on_behind_the_last_batch(
    tasks: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    node = Node.make({"rule": "topk"}, "intermediate", "0.45")
    expected = outcome(
        open_session(manifest, {"pair": tasks["pair"]}, batch_size=3), node, tmp_path / "whole"
    )

    class Cut(Exception):
        pass

    session = open_session(manifest, {"pair": tasks["pair"]}, batch_size=3)
    told = session.lm.told
    left = [2]

    def cut(*arguments: Any) -> Any:
        if not left[0]:
            raise Cut
        left[0] -= 1
        return told(*arguments)

    monkeypatch.setattr(session.lm, "told", cut)
    with pytest.raises(Cut):
        evaluate_node(session, node, tmp_path / "cut")
    again = open_session(manifest, {"pair": tasks["pair"]}, batch_size=3)
    batches = on_a_gpu(monkeypatch)
    assert outcome(again, node, tmp_path / "cut") == expected
    assert batches == [2, 3]


@pytest.mark.parametrize("broken", [1, 2])
def test_numbers_that_are_not_finite_are_reported(
    tasks: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    on_a_gpu(monkeypatch)
    session = open_session(manifest, {"long": tasks["long"]}, batch_size=4)
    layer = session.lm.model.model.layers[1].mlp
    proved = session.lm._try_generation

    def then_break(*arguments: Any) -> None:
        proved(*arguments)
        with torch.no_grad():
            (layer.up_proj.weight if broken == 1 else layer.down_proj.weight)[0, 0] = float("inf")

    monkeypatch.setattr(session.lm, "_try_generation", then_break)
    result = evaluate_node(session, Node.make({"rule": "topp"}, "intermediate", "0.9"), tmp_path)
    where = "'intermediate' of layer 1" if broken == 1 else "the logits"
    assert result["tasks"]["long"] == {"status": "failed", "reason": f"NaN or infinity in {where}"}


def test_what_cannot_be_counted_is_refused_as_ever(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    options = GENERATION["generation_kwargs"] | {"num_beams": 2}
    task = write_task(
        tmp_path / "t", "beams", rolling_documents(3), **GENERATION | {"generation_kwargs": options}
    )
    result = evaluate_node(open_session(manifest, {"beams": task}), None, tmp_path / "node")
    assert "num_beams: 2 found" in result["tasks"]["beams"]["reason"]
