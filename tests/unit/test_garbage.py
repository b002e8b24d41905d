"""Garbage is hardly looked for until a model is there, and then as ever."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from sparsity_atlas import cli
from sparsity_atlas.garbage import look_as_usual
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from tiny_lm import save_model


@pytest.fixture
def usual(as_before: None) -> tuple[int, int, int]:
    look_as_usual()
    return gc.get_threshold()


def test_from_the_start_of_a_stage_to_its_model(
    usual: tuple[int, int, int], tmp_path: Path
) -> None:
    seen = []
    cli.run(lambda: seen.append(gc.get_threshold()))
    assert seen[0][0] >= 100 * usual[0]
    load(Checkpoint(save_model(tmp_path / "model")), dtype="float32", device="cpu")
    assert gc.get_threshold() == usual
