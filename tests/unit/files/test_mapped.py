"""Files are mapped no longer than their weights are used as they lie in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from tiny_models import tiny_model

MAPS = Path("/proc/self/maps")
linux = pytest.mark.skipif(not MAPS.is_file(), reason="nothing says what is mapped")


def saved(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint in bfloat16 with one tensor in another type, or in it altogether."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name, one in weights.items():
        if dtype == torch.float32 or name == "model.norm.weight":
            weights[name] = one.float() + 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@linux
def test_one_weight_does_not_keep_a_file(tmp_path: Path) -> None:
    weights = saved(tmp_path, torch.bfloat16)
    model = load(Checkpoint(tmp_path), dtype="float32", device="cpu")
    assert f"{tmp_path}/model.safetensors\n" not in MAPS.read_text()
    for name, one in model.named_parameters():
        assert torch.equal(one, weights[name].float())


@linux
def test_weights_that_lie_there_are_not_copied(tmp_path: Path) -> None:
    saved(tmp_path, torch.float32)
    model = load(Checkpoint(tmp_path), dtype="float32", device="cpu")
    assert f"{tmp_path}/model.safetensors\n" in MAPS.read_text()
    assert model.dtype == torch.float32
