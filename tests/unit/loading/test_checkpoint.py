"""The type that a checkpoint's numbers are said to have, whoever says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsity_atlas.loading.checkpoint import Checkpoint

WEIGHTS = {
    "norm": torch.ones(8),
    "map": torch.ones(8, 8, dtype=torch.bfloat16),
    "packed": torch.ones(64, 8, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, "bfloat16"),  # of 72 numbers that are no codes, 64
        ({"dtype": None}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"vision_config": {"dtype": "float16"}}, "bfloat16"),
        ({"dtype": "float32", "text_config": {"dtype": "float16"}}, "float32"),
    ],
)
def test_the_type_of_the_numbers(config: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).dtype() == wanted


def test_pickles_that_nothing_is_said_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert Checkpoint(tmp_path, allow_pickle=True).dtype() is None
