"""lm-eval runs a masked-diffusion model under our name, and gets what the pipeline gets."""

from __future__ import annotations

from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from masked_diffusion import save_diffusion
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import harness
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_simple_evaluate_gives_the_node_s_numbers(tmp_path: Path) -> None:
    at = tmp_path / "tasks"
    tasks = {
        "choice": write_task(at, "choice", choice_documents(4), **CHOICE),
        "pages": write_task(at, "pages", rolling_documents(2), **ROLLING),
        "last": write_task(at, "last", rolling_documents(4, 3), **LAST_WORD),
        "words": write_task(at, "words", rolling_documents(3, 4), **GENERATION),
    }
    folder = save_diffusion(tmp_path / "m")
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    node = Node.make({"rule": "topp"}, "intermediate", "0.6")
    settings = {"samples": 5, "guidance": 0.5, "steps": 6}
    session = open_session(manifest, tasks, diffusion=settings)
    ours = evaluate_node(session, node, tmp_path / "node")["tasks"]
    arguments = f"pretrained={folder},device=cpu,criterion=topp,site=intermediate,level=0.6"
    for name in tasks:
        theirs = lm_eval.simple_evaluate(
            model="sparsity-atlas",
            model_args=f"{arguments},samples=5,guidance=0.5,steps=6",
            tasks=[name],
            batch_size=4,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(at), include_defaults=False),
        )
        for key, value in ours[name]["scores"][name].items():
            if value is not None:
                assert theirs["results"][name][key] == value
        assert theirs["config"]["sparsity"] == ours[name]["sparsity"]
        diffusion = {**settings, "block_length": 32, "remasking": "low_confidence"}
        assert theirs["config"]["diffusion"] == diffusion


def test_masks_are_not_followed_from_step_to_step(tmp_path: Path) -> None:
    """lm-eval's results have no place for that, and it takes time and memory."""
    given = {"criterion": "topp", "site": "intermediate", "level": 0.6}
    lm = harness.HarnessLM(pretrained=str(save_diffusion(tmp_path / "m")), device="cpu", **given)
    with lm._attached() as counter:
        assert len(counter.slots) == 2
        assert len(counter.by_step.slots) == 0


@pytest.mark.parametrize("said", ["samples=5", "steps=3", "mask_token_id=4", "remasking=random"])
def test_a_causal_model_is_not_asked_with_masks(model_folder: Path, said: str) -> None:
    name, value = said.split("=")
    with pytest.raises(AtlasError, match=f"{name}: .*masked-diffusion|{name}.*causal"):
        harness.HarnessLM(pretrained=str(model_folder), device="cpu", **{name: value})
