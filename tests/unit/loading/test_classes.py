"""Checkpoints for more than text: loaded by their own class, given text, counted without the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
)

from small_configs import small_config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import blank, load
from sparsity_atlas.models.manifest import describe
from sparsity_atlas.terms import SITES
from tiny_lm import tiny_tokenizer

# With the module that holds their decoder.
KINDS = {
    "qwen2_5_vl": "model.language_model",
    "qwen3_vl": "model.language_model",
    "mistral3": "model.language_model",
    "llava": "model.language_model",
    "smolvlm": "model.text_model",
    "idefics3": "model.text_model",
    "internvl": "model.language_model",
    "gemma3": "model.language_model",
    "voxtral": "model.language_model",
}


def save_multimodal(folder: Path, kind: str) -> Path:
    """A random small one, in float32."""
    config = small_config(kind, vocab_size=300)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_of_a_multimodal_model(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_multimodal(tmp_path / "m", kind))
    found = describe(checkpoint, None)
    model = load(checkpoint, device="cpu")
    decoder = model.get_submodule(KINDS[kind])
    own = {*decoder.parameters(), *model.get_output_embeddings().parameters()}
    assert found["kind"] == "causal"
    assert tuple(found["sites"]) == SITES
    assert found["parameters"]["total"] == sum(one.numel() for one in own)
    assert found["parameters"]["loaded"] == model.num_parameters() > found["parameters"]["total"]
    assert all(one["down"]["module"].startswith(KINDS[kind]) for one in found["ffn"])
    with torch.device("meta"):
        assert blank(checkpoint).num_parameters() == model.num_parameters()


def test_the_text_part_of_llama_4(tmp_path: Path) -> None:
    """Its whole model's forward pass fails on text alone; weights for images are no fault of the rest."""
    config = small_config("llama4", vocab_size=300)
    config.text_config.num_experts_per_tok = 1
    config.architectures = ["Llama4ForConditionalGeneration"]
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert any(name.startswith("vision_model.") for name in model.state_dict())
    found = describe(Checkpoint(tmp_path), None)
    assert found["kind"] == "causal"
    assert found["parts"]["experts"]
    loaded = load(Checkpoint(tmp_path), device="cpu")
    assert found["parameters"]["total"] == loaded.num_parameters() < model.num_parameters()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[f"language_model.{name}"])
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "vision_model.more": weights["language_model.model.norm.weight"].clone()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(AtlasError, match=r"1 tensor is not expected \(vision_model.more\)"):
        load(Checkpoint(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("kind", "auto", "found"),
    [
        ("bart", AutoModelForSeq2SeqLM, None),
        ("bart", AutoModelForCausalLM, "BartForCausalLM"),
        ("t5", AutoModelForSeq2SeqLM, None),
    ],
)
def test_an_encoder_decoder_is_none_that_its_decoder_alone_is(
    kind: str, auto: Any, found: str | None, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "vocab_size": 300}
    if kind == "bart":
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    else:
        sizes |= {"num_layers": 1, "num_heads": 2, "d_ff": 24}
    auto.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    if found is not None:
        assert type(load(Checkpoint(tmp_path), device="cpu")).__name__ == found
        return
    with pytest.raises(AtlasError, match=f"'{kind}': it is an encoder-decoder, and only"):
        load(Checkpoint(tmp_path), device="cpu")
