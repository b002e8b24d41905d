"""Masks over the steps of a task's generations: they are those of the sample table, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from masked_diffusion import save_diffusion
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table as read_samples
from sparsity_atlas.evaluation.step_table import NAME, read_table
from sparsity_atlas.models.memory import Largest
from sparsity_atlas.sparsify.step_counts import mask_bytes
from sparsity_atlas.upkeep.doctor import examine
from tiny_lm import (
    CHOICE,
    GENERATION,
    choice_documents,
    open_session,
    rolling_documents,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NODE = Node.make({"rule": "topk"}, "all_inputs", "0.4")
STEPS = 3
BLOCKS = ("prompt", "answer")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_diffusion(tmp_path_factory.mktemp("diffusion") / "m")
    return write_model_manifest(folder, folder.parent / "model.json")


@pytest.fixture(scope="module")
def tasks(manifest: Path) -> dict[str, dict[str, Any]]:
    at = manifest.parent / "tasks"
    options = {**GENERATION["generation_kwargs"], "max_gen_toks": 6, "steps": STEPS}
    words = {**GENERATION, "generation_kwargs": options}
    return {
        "choice": write_task(at, "choice", choice_documents(3), **CHOICE),
        "words": write_task(at, "words", rolling_documents(5, 4), **words),
    }


def session_of(manifest: Path, tasks: dict, **changes: Any) -> Session:
    settings = {"samples": 3, **changes.pop("diffusion", {})}
    return open_session(manifest, tasks, diffusion=settings, **changes)


def test_steps_add_up_to_the_sample_table(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    session = session_of(manifest, tasks)
    found = evaluate_node(session, NODE, tmp_path)
    assert found["by_step"] == ["input", "intermediate"]
    table = read_table(tmp_path / NAME)
    assert table.tasks == found["fingerprints"]
    # Scoring is no step.
    assert table.rows["choice"].num_rows == 0
    rows = table.rows["words"].to_pylist()
    assert {row["step"] for row in rows} == {None, *range(STEPS)}
    header, samples = read_samples(tmp_path / "samples.parquet")
    own = [row for row in samples.to_pylist() if row["task"] == "words"]
    for place, (tensor, layer, width) in enumerate(header["slots"]):
        of_slot = [row for row in rows if (row["tensor"], row["layer"]) == (tensor, layer)]
        for one in (
            [row for row in of_slot if row["step"] is None],
            [row for row in of_slot if row["step"] is not None and row["region"] in BLOCKS],
        ):
            tokens = sum(row["tokens"] for row in one)
            zeros = sum(row["entries"] - row["kept"] for row in one)
            assert tokens == sum(row["denoising_tokens"] for row in own)
            assert zeros == sum(row["denoising_zeros"][place] for row in own)
            assert {row["entries"] for row in one} == {row["tokens"] * width for row in one}
    # Six tokens, of which each step fills two in.
    by_region = {
        (row["step"], row["region"]): row["tokens"]
        for row in rows
        if (row["tensor"], row["layer"]) == ("input", 0)
    }
    rest = {region: by_region[2, region] for region in ("masked", "new", "filled")}
    assert rest == {"masked": 5 * 2, "new": 5 * 2, "filled": 5 * 2}


def test_batches_and_guidance_change_nothing(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    """What is the same in any batch is so to the byte; the pass that guides is no step."""
    found = {}
    for size in (1, 4):
        at = tmp_path / str(size)
        evaluate_node(
            session_of(manifest, tasks, batch_size=size, diffusion={"guidance": 0.5}), NODE, at
        )
        found[size] = read_table(at / NAME).rows["words"]
    assert found[1].equals(found[4])
    assert {row["step"] for row in found[1].to_pylist()} == {None, *range(STEPS)}
    _, samples = read_samples(tmp_path / "1" / "samples.parquet")
    run = sum(row["denoising_tokens"] for row in samples.to_pylist())
    counted = [
        row
        for row in found[1].to_pylist()
        if row["step"] is None and (row["tensor"], row["layer"]) == ("input", 0)
    ]
    assert 2 * sum(row["tokens"] for row in counted) == run


def test_the_untouched_model_has_no_table(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    evaluate_node(session_of(manifest, tasks), None, tmp_path)
    assert not (tmp_path / NAME).exists()
    assert "by_step" not in json.loads((tmp_path / "eval.json").read_text())


def test_masks_that_do_not_fit_are_refused(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a task begins, and only of tasks that generate."""
    session = session_of(manifest, tasks)
    lm, work = session.lm, {name: session.prepared(name).work for name in tasks}
    with session.attach(NODE) as counter:
        slots = counter.by_step.slots
        batch = Largest(tokens=60, longest=20)
        assert lm._beside(work["words"], counter, batch) == mask_bytes(slots, 3, 20, 20) > 0
        assert lm._beside(work["choice"], counter, batch) == 0
    monkeypatch.setattr(type(lm), "_beside", lambda *_: 1 << 60)
    with pytest.raises(AtlasError, match="batch_size"):
        evaluate_node(session, NODE, tmp_path)


def test_doctor_knows_the_table(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    node = tmp_path / "results/tiny/topk/all_inputs/0.4"
    evaluate_node(session_of(manifest, tasks), NODE, node)

    def problems() -> list[str]:
        return [found.problem for found in examine(tmp_path / "results") if found.problem]

    assert problems() == []
    content = (node / NAME).read_bytes()
    (node / NAME).unlink()
    assert problems() == ["steps.parquet has not the 'choice' that eval.json tells of"]
    (node / NAME).write_bytes(content[:-9] + b"x" + content[-8:])
    (problem,) = problems()
    assert problem.startswith("steps.parquet: damaged table")


def test_a_model_that_fails_has_no_rows(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    """And does not leave half a batch to the next task."""
    session = session_of(manifest, {"words": tasks["words"], "again": tasks["words"]})
    weight = session.lm.model.model.layers[1].mlp.down_proj.weight
    original, passes = weight.detach().clone(), []

    def spoil(*_: Any) -> None:
        passes.append(0)
        weight.data[:] = torch.nan if len(passes) == 2 else original

    handle = session.lm.model.register_forward_pre_hook(spoil)
    session.prepared("words"), session.prepared("again")
    passes.clear()
    found = evaluate_node(session, NODE, tmp_path)
    handle.remove()
    assert found["tasks"]["words"]["status"] == "failed"
    table = read_table(tmp_path / NAME)
    assert table.rows["words"].num_rows == 0
    whole = evaluate_node(session, NODE, tmp_path / "whole")
    assert whole["tasks"]["words"]["status"] == "ok"
    again = read_table(tmp_path / "whole" / NAME).rows["again"]
    assert table.rows["again"].equals(again)
