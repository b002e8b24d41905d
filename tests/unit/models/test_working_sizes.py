"""What is read of configurations that name more than a Llama's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsity_atlas.models import working_sizes
from sparsity_atlas.models.memory import Sizes

NOBODY_ENDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
TWO = ["linear_attention", "full_attention"]
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def model(kind: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, **NOBODY_ENDS, **settings
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights a head cannot be tried."""
    monkeypatch.setattr(working_sizes, "able", lambda _: True)


def test_a_llama_has_none_of_them() -> None:
    found = working_sizes.describe(
        model("llama", intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    )
    plain = {"vocabulary": 64, "pieces": True, "heads": 0, "capped": False}
    assert found == {**plain, "cache": 2 * 2 * 2 * 8}


def test_streams_and_inputs_of_layers() -> None:
    found = working_sizes.describe(
        model(
            "gemma3n_text",
            intermediate_size=[64, 64],
            activation_sparsity_pattern=[0.0, 0.0],
            layer_types=["full_attention"] * 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            altup_num_inputs=4,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=64,
            num_kv_shared_layers=0,
            laurel_rank=4,
        )
    )
    assert (found["streams"], found["layer_inputs"]) == (4, 2 * 16)


def test_linear_attention_with_heads_of_keys_and_of_values() -> None:
    found = working_sizes.describe(
        model(
            "qwen3_next",
            **MIXTURE,
            layer_types=TWO,
            intermediate_size=64,
            shared_expert_intermediate_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=16,
        )
    )
    own = {"linear": 4 * 24, "linear_pairs": 4, "linear_inputs": 4 * 16 + 3 * 64}
    assert {name: found[name] for name in own} == own
    assert (found["state"], found["linear_layers"]) == (4 * 8 * 16, 1)
    # Of the one layer that keeps keys and values.
    assert found["cache"] == 2 * 2 * 8
    Sizes(parameters=1, hidden=32, width=16, layers=2, **found)


def test_linear_attention_with_one_number_of_heads_decays_by_channel() -> None:
    config = AutoConfig.for_model("kimi_linear", linear_num_heads=4, linear_head_dim=8)
    assert working_sizes._linear(config, 3) == {
        **{"linear": 4 * 16, "linear_pairs": 4 * 8, "linear_inputs": 7 * 32},
        **{"state": 4 * 8 * 8, "linear_layers": 3},
    }


def test_hyper_connections_are_streams() -> None:
    for kind, name in (("deepseek_v4", "hc_mult"), ("qwen4_exp_text", "hc_count")):
        assert working_sizes.streams(AutoConfig.for_model(kind, **{name: 3})) == 3
    assert working_sizes.streams(AutoConfig.for_model("llama")) == 0
    # One stream is the usual residual.
    assert working_sizes.streams(AutoConfig.for_model("gemma3n_text", altup_num_inputs=1)) == 0
