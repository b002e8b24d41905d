"""Checkpoints for more than text: loaded by their own class, given text, counted without the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from small_configs import small_config
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
