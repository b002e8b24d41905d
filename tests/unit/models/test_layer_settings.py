"""Settings that differ from layer to layer, in the three ways that configurations state them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import blank
from sparsity_atlas.models.layer_settings import in_all_layers, in_layers
from sparsity_atlas.models.manifest import describe
from sparsity_atlas.plan.model_facts import _configured
from tiny_lm import tiny_tokenizer

SIZES: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40},
}
# Gemma 4: a wider head, and other keys, where a layer sees everything.
WIDE_HEADS = {
    **{"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    **{"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300},
}
PRUNED = {"per_layer_config": {1: {"intermediate_size": 24}, 2: {"intermediate_size": 72}}}


def saved(folder: Path, kind: str, **settings: Any) -> Checkpoint:
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "settings", "widths", "cache"),
    [
        ("llama", {}, [40, 40, 40], 3 * 2 * 2 * 8),
        ("gemma4_text", WIDE_HEADS, [40, 40, 40], 2 * 2 * (8 + 8 + 16)),
    ],
)
def test_a_model_whose_layers_differ(
    kind: str, settings: dict[str, Any], widths: list[int], cache: int, tmp_path: Path
) -> None:
    """In its manifest, and before there is one, as `plan` sees it."""
    checkpoint = saved(tmp_path / "m", kind, **settings)
    found = describe(checkpoint, None)
    assert found["memory"]["cache"] == cache
    assert [one["width"] for one in found["ffn"] if one.get("part") != "attention"] == widths
    with torch.device("meta"):
        known = _configured(blank(checkpoint))
    assert [one["intermediate"] for one in known] == widths


def test_what_layers_have_in_common() -> None:
    config = AutoConfig.for_model("llama", **{**SIZES, **PRUNED})
    assert in_layers(config, "intermediate_size") == [40, 24, 72]
    assert in_all_layers(config, "intermediate_size") is None
    assert in_all_layers(config, "hidden_size") == 32
    assert in_layers(config, "sliding_window") == [None] * 3
    listed = AutoConfig.for_model("gemma3n_text", num_hidden_layers=2, intermediate_size=[24, 48])
    assert in_layers(listed, "intermediate_size") == [24, 48]
    assert in_all_layers(listed, "intermediate_size") is None
