"""What a masked-diffusion model will compute, before it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from masked_diffusion import save_diffusion
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import parse
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.plan.model_facts import Unknowns, look, measure
from sparsity_atlas.tasks.load import load_tasks
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


def test_tokens_are_those_of_the_evaluation(tmp_path: Path) -> None:
    kinds: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "choice": (CHOICE, choice_documents(4)),
        "rolling": (ROLLING, rolling_documents(2)),
        "last": (LAST_WORD, rolling_documents(4, 3)),
        "words": (GENERATION, rolling_documents(3, 4)),
    }
    tasks = {
        name: write_task(tmp_path / "tasks", name, documents, **kind)
        for name, (kind, documents) in kinds.items()
    }
    folder = save_diffusion(tmp_path / "m")
    entry = {"path": str(folder), "diffusion": {"samples": 5, "guidance": 0.5}, "batch_size": 4}
    config = parse(
        {
            **{"device": "cpu", "models": {"tiny": entry}, "criteria": {"topp": {}}},
            **{"texts": {"prose": {"file": "text.txt"}}, "tasks": tasks},
            "run": [{"models": ["tiny"]}],
        }
    )
    unknowns = Unknowns()
    loaded = load_tasks(tasks, config.seed)
    outlook = look(config, "tiny", loaded, tmp_path / "none.json", unknowns)
    assert not unknowns
    settings = json.loads(grid.evaluation_slice(config, "tiny", tuple(tasks)))
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    session = open_session(manifest, settings.pop("tasks"), **settings)
    real = evaluate_node(session, None, tmp_path / "dense")["tasks"]
    for name, cost in outlook.costs.items():
        tokens = real[name]["tokens"]
        run = tokens["scoring"] + tokens["denoising"]
        # A text may end before its last block.
        assert run == cost.requests if name != "words" else 0 < run <= cost.requests
        assert run <= cost.positions
        assert cost.generation == cost.steps == 0
        assert cost.documents == real[name]["items"]
    # Passes over such a batch are timed as a causal model's are.
    measure(config, "tiny", outlook, {None: None})
    assert set(outlook.seconds[None]) == set(tasks)
    assert min(outlook.seconds[None].values()) > 0
