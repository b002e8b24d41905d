"""A masked-diffusion model's node, killed: the next run repeats a batch at most, with the same bytes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from checkout import Checkout
from masked_diffusion import save_diffusion
from sparsity_atlas.evaluation.step_table import NAME
from tiny_lm import (
    CHOICE,
    GENERATION,
    choice_documents,
    rolling_documents,
    settings,
    write_model_manifest,
    write_task,
)

BATCH, STEPS = 2, 4
# Texts of eight tokens in two blocks: passes of a batch, of which no text ends early.
OPTIONS = {"until": ["zz"], "max_gen_toks": 8, "steps": STEPS, "block_length": 4}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command of a node, but for its output."""
    at = tmp_path_factory.mktemp("denoising")
    manifest = write_model_manifest(save_diffusion(at / "m"), at / "model.json")
    tasks = {
        "choice": write_task(at / "tasks", "choice", choice_documents(3), **CHOICE),
        "words": write_task(
            *(at / "tasks", "words", rolling_documents(5, 4)),
            **{**GENERATION, "generation_kwargs": OPTIONS},
        ),
    }
    asked = settings(tasks, batch_size=BATCH, diffusion={"samples": 3})
    return (
        *("-m", "sparsity_atlas", "evaluate", "--model", str(manifest), "--code", "test"),
        *("--settings", json.dumps(asked), "--criterion", json.dumps({"rule": "topp"})),
        *("--site", "intermediate", "--level", "0.8", "--output", "results/node/eval.json"),
    )


def run(folder: Path, asked: tuple[str, ...], **kill: str) -> tuple[int, int]:
    """Exit code and forward passes of the stage in a folder."""
    checkout = Checkout(folder)
    folder.mkdir(exist_ok=True)
    checkout.forget_forwards()
    log = folder / "log"
    code = checkout.start(*asked, log=log, **kill).wait(timeout=300)
    assert code in (0, -signal.SIGKILL), log.read_text()
    return code, len(checkout.forwards())


@pytest.fixture(scope="module")
def whole(asked: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "atlas"
    assert run(folder, asked)[0] == 0
    return Checkout(folder)


def test_killed_in_a_pass(asked: tuple[str, ...], whole: Checkout, tmp_path: Path) -> None:
    """In the midst of the steps of a batch of texts, and in the last one of all."""
    passes = len(whole.forwards())
    assert f"node/{NAME}" in whole.contents()
    for kill in (passes - 2 * STEPS - 1, passes):
        folder = tmp_path / str(kill)
        assert run(folder, asked, KILL=f"evaluate:{kill}") == (-signal.SIGKILL, kill)
        assert "node/eval.json" not in Checkout(folder).contents()
        code, again = run(folder, asked)
        assert code == 0
        # The pass in which it was killed is one of the batch that is repeated.
        assert passes <= kill + again <= passes + STEPS
        assert Checkout(folder).contents() == whole.contents()


def test_killed_between_the_tables(asked: tuple[str, ...], whole: Checkout, tmp_path: Path) -> None:
    """Samples come last, since they say which tasks are finished."""
    passes = len(whole.forwards())
    assert run(tmp_path, asked, KILL_WRITE="evaluate:2") == (-signal.SIGKILL, passes)
    left = {path.name for path in (tmp_path / "results/node").glob("*.parquet")}
    assert left == {"steps.parquet"}
    assert run(tmp_path, asked) == (0, 0)
    assert Checkout(tmp_path).contents() == whole.contents()
