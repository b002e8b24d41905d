"""Captured activations that several files of this room look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsity_atlas.activations import capture
from tiny_lm import run_stage, sentences


@pytest.fixture(scope="session")
def captured(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with ten sequences of sixteen tokens."""
    folder = tmp_path_factory.mktemp("captured")
    text = folder / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": line}) + "\n"
            for line in sentences(60, seed=3, shortest=12, longest=20)
        )
    )
    settings = {"dtype": "auto", "device": "cpu", "text": {"file": str(text)}, "tokens": 160}
    settings |= {"sequence_length": 16, "batch_size": 4, "add_bos_token": None}
    run_stage(
        capture,
        {
            **{"--model": manifest, "--site": "gate", "--siblings": "gate"},
            **{"--settings": json.dumps(settings), "--store": folder / "activations.zarr"},
            "--output": folder / "capture/gate.json",
        },
    )
    return folder
