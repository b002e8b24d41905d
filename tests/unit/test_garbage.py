"""Garbage is hardly looked for until a model is there, and then as ever."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsity_atlas import cli
from sparsity_atlas.garbage import look_as_usual
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from tiny_lm import save_model


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    look_as_usual()
    yield gc.get_threshold()
    look_as_usual()


def test_from_the_start_of_a_stage_to_its_model(
    usual: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    seen = []
    cli.run(lambda: seen.append(gc.get_threshold()))
    assert seen[0][0] >= 100 * usual[0]
    load(Checkpoint(save_model(tmp_path / "model")), dtype="float32", device="cpu")
    assert gc.get_threshold() == usual
