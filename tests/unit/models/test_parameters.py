"""What a model's size is: parameters that a pass over text uses, by what it computes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixtures import EACH, EXPERTS, tiny_mixture
from sparsity_atlas.models.parameters import count_parameters
from sparsity_atlas.sites.find import find_parts
from tiny_models import ARCHITECTURES, GROUPED, Strange, tiny_model

VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
LAYERS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_parameters_of_a_text_model(name: str) -> None:
    model = tiny_model(name)
    found = count_parameters(model)
    assert found["total"] == found["loaded"] == model.num_parameters()
    assert 0 < found["non_embedding"] < found["total"]


@pytest.mark.parametrize("tie", [True, False])
def test_by_hand(tie: bool) -> None:
    """Llama: 64 × 16 for embedding and head; layers: q, o 16 × 16; k, v 8 × 16; FFN 3 × 16 × 40; norms."""
    layer = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 40 + 2 * 16
    inner, table = 2 * layer + 16, 64 * 16
    total = inner + (1 if tie else 2) * table
    found = count_parameters(tiny_model("llama", tie_word_embeddings=tie))
    assert found == {"total": total, "non_embedding": inner, "loaded": total}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vision_tower_is_not_counted(dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(
        "gemma3", text_config=GROUPED | LAYERS, vision_config=VISION, mm_tokens_per_image=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    text = count_parameters(tiny_model("gemma3", **LAYERS))
    found = count_parameters(model)
    assert {**found, "loaded": text["loaded"]} == text
    assert found["loaded"] == model.num_parameters() > 2 * text["total"]


def test_parameters_that_are_used_without_their_module() -> None:
    """As F.linear(x, self.weight): no hook sees them."""
    model = Strange("parameters")
    model.register_parameter("unused", nn.Parameter(torch.ones(5)))
    whole = sum(one.numel() for one in model.parameters())
    assert count_parameters(model) == {
        **{"total": whole - 5, "non_embedding": whole - 5 - 64 * 16, "loaded": whole}
    }


@pytest.mark.parametrize("change", ["frozen", "without derivatives"])
def test_what_a_model_does_with_derivatives(change: str, monkeypatch: Any) -> None:
    model = tiny_model("llama")
    if change == "frozen":
        model.requires_grad_(False)
    else:
        monkeypatch.setattr(model, "forward", torch.no_grad()(model.forward))
    assert count_parameters(model)["total"] == model.num_parameters()
    assert all(one.grad is None for one in model.parameters())
    assert {one.requires_grad for one in model.parameters()} == {change != "frozen"}


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "gemma4_text"])
def test_of_routed_experts_a_token_meets_k(family: str) -> None:
    """All experts but K of each layer are left out; routers, shared experts and dense layers are not."""
    model = tiny_mixture(family)
    found = count_parameters(model, find_parts(model))
    resting = sum(
        one.numel() // EXPERTS * (EXPERTS - EACH)
        for name, one in model.named_parameters()
        if ".experts." in name
    )
    assert resting
    assert found["active"] == found["total"] - resting
    assert found["active_non_embedding"] == found["non_embedding"] - resting
    assert found["total"] == found["loaded"]


def test_a_dense_model_has_no_active_ones() -> None:
    model = tiny_model("llama")
    assert "active" not in count_parameters(model, find_parts(model))
