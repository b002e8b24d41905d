"""Quantised checkpoints: in plain numbers where that is asked for, refused in one line else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from mixtures import wide_mixture
from small_configs import small_config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import blank, load
from sparsity_atlas.loading.quantised import KEY
from sparsity_atlas.models import manifest as models
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sites.projection import Projection
from tiny_lm import save_model

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
SIZES = {
    **{"kind": "qwen3", "hidden_size": 32, "intermediate_size": 48, "head_dim": 16},
    "num_key_value_heads": 2,
}
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


def quantise_fp8(folder: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """Store a checkpoint's maps in 8 bits, a scale a block; returns what all tensors then stand for."""
    path = folder / "model.safetensors"
    stored, plain = {}, {}
    for name, value in load_file(path).items():
        if "_proj" not in name:
            stored[name] = value.to(torch.bfloat16)
            plain[name] = stored[name].float()
            continue
        tiles = value.unflatten(1, (-1, block)).unflatten(0, (-1, block))
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        short = (tiles / scale).to(torch.float8_e4m3fn)
        plain[name] = (short.float() * scale).reshape(value.shape)
        stored[name] = short.reshape(value.shape)
        stored[f"{name}_scale_inv"] = scale.reshape(scale.shape[0], scale.shape[2])
    save_file(stored, path, metadata={"format": "pt"})
    _say(folder, {**FP8, "weight_block_size": [block, block]})
    return plain


def _say(folder: Path, how: dict[str, Any]) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), "dtype": "bfloat16", "quantization_config": how}
    path.write_text(json.dumps(content))


def test_fp8_in_plain_numbers(tmp_path: Path) -> None:
    folder = save_model(tmp_path, **SIZES)
    plain = quantise_fp8(folder)
    model = load(Checkpoint(folder, dequantise=True), device="cpu")
    found = dict(model.named_parameters())
    assert set(found) == set(plain)
    for name, value in plain.items():
        # It is multiplied out in bfloat16.
        torch.testing.assert_close(found[name], value, rtol=2**-7, atol=0)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert len(find_parts(model)) == 4
    assert not hasattr(model.config, "quantization_config")
    with torch.device("meta"):
        assert blank(Checkpoint(folder, dequantise=True)).num_parameters() == model.num_parameters()


def test_what_is_said_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "m", **SIZES)
    quantise_fp8(folder)
    source = {"path": str(folder), "dequantise": True}
    output = tmp_path / "model.json"
    words = ["--name", "m", "--source", json.dumps(source), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["models", *words])
    models.main()
    assert read_manifest(output)["dequantised"] == "fp8"
    assert models.from_manifest(output)[1].dequantise


# The numbers of four bits, by their bits.
FOURS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_in_plain_numbers(tmp_path: Path) -> None:
    """gpt-oss's experts: two numbers a byte, the first in its lower half, and an exponent for each 32."""
    config = small_config("gpt_oss", vocab_size=300, intermediate_size=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored, plain = load_file(path), {}
    for name in [one for one in stored if one.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 128, (experts, outputs, inputs // 32), dtype=torch.uint8)
        pairs = torch.stack([FOURS[(blocks & 15).long()], FOURS[(blocks >> 4).long()]], -1)
        numbers = pairs.flatten(-2) * 2.0 ** (scales[..., None].float() - 127)
        plain[name] = numbers.flatten(-2).transpose(1, 2)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    assert len(plain) == 2 * config.num_hidden_layers
    save_file(stored, path, metadata={"format": "pt"})
    _say(tmp_path, MXFP4)
    model = load(Checkpoint(tmp_path, dequantise=True), device="cpu")
    assert model.dtype == torch.float32
    found = dict(model.named_parameters())
    for name, value in plain.items():
        assert torch.equal(found[name], value)
    assert any(part.name == "experts" for part in find_parts(model))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            r"\(gptq\): only what transformers turns into plain numbers",
        ),
        ({"quant_method": "awq", "bits": 4}, r"\(awq\): only what transformers turns"),
        (PACKED, "needs the package compressed-tensors: pip install compressed-tensors"),
        ({"quant_method": "bitsandbytes"}, "needs the package bitsandbytes: pip install bitsandb"),
        (None, "dequantise: true, but its config.json names no quantisation"),
    ],
)
def test_what_cannot_be_dequantised(
    how: dict[str, Any] | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    content = {"model_type": "llama"} if how is None else {"model_type": "llama", KEY: how}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(AtlasError, match=says):
        Checkpoint(tmp_path, dequantise=True).config()


def test_bytes_are_not_taken_for_a_matrix() -> None:
    """Quantised maps derive from Linear and keep what they packed under the same name."""
    packed, turned = nn.Linear(4, 6), nn.Linear(4, 6)
    packed.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.uint8), requires_grad=False)
    turned.weight = nn.Parameter(torch.zeros(12, 2), requires_grad=False)
    assert Projection("up", nn.Linear(4, 6)).weight() is not None
    assert [Projection("up", one).weight() for one in (packed, turned)] == [None, None]
