"""Quantised checkpoints are refused in one line that names their kind; mixtures often come so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtures import wide_mixture
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
PACKED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "qwen3_moe", "quantization_config": FP8}, "fp8"),
        ({"model_type": "deepseek_v3", "quantization_config": FP8}, "fp8"),
        ({"model_type": "gpt_oss", "quantization_config": MXFP4}, "mxfp4"),
        ({"model_type": "llama4", "quantization_config": PACKED}, "compressed-tensors"),
        ({"model_type": "llama4", "text_config": {"quantization_config": PACKED}}, "compressed-t"),
        ({"model_type": "olmoe", "quantization_config": {"bits": 4}}, "unknown method"),
    ],
)
def test_by_its_configuration(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    """Before any weight is read: there is none."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AtlasError, match=rf"a quantised checkpoint \({kind}") as caught:
        Checkpoint(tmp_path).config()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_experts_in_eight_bits_that_the_configuration_is_silent_about(
    family: str, tmp_path: Path
) -> None:
    """One tensor an expert, under names that the model does not have, and its scale beside it."""
    wide_mixture(family).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    names = [name for name in weights if ".experts.0." in name]
    assert names
    for name in names:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        AtlasError, match=r"experts\.0\.\S+ is stored as F8_E4M3; expected"
    ) as caught:
        load(Checkpoint(tmp_path))
    assert "\n" not in str(caught.value)


def test_experts_in_four_bits_that_the_configuration_is_silent_about(tmp_path: Path) -> None:
    """Blocks and scales in place of the weights, as gpt-oss has them."""
    wide_mixture("olmoe").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    kept = {name: one for name, one in weights.items() if ".layers.0.mlp.experts." not in name}
    place = "model.layers.0.mlp.experts.gate_up_proj"
    kept[f"{place}_blocks"] = torch.zeros(8, 128, 4, 16, dtype=torch.uint8)
    kept[f"{place}_scales"] = torch.zeros(8, 128, 4, dtype=torch.uint8)
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(AtlasError, match=r"missing.*gate_up_proj_blocks") as caught:
        load(Checkpoint(tmp_path))
    assert "\n" not in str(caught.value)
