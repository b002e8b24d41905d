"""What a pass holds, as it is counted, against sums made by hand and against passes of other shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsity_atlas.models import counting
from sparsity_atlas.models.counted import Counted
from sparsity_atlas.models.memory import Largest, Sizes, of_a_pass
from tiny_models import tiny_model

NOBODY_ENDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, **NOBODY_ENDS}
GROUPED = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
# A scan of Mamba's kind, in chunks of 256 tokens; one token by token; latent attention, which keeps its
# scores; linear attention in chunks of 64.
TWO = ["linear_attention", "full_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "bamba": {
        **{**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
        **{"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 256},
    },
    "jamba": {
        **{**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
        **{"mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    },
    "deepseek_v3": {
        **{**GROUPED, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_group": 1},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "topk_group": 1},
    },
    "qwen3_next": {
        **{**GROUPED, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 16, "layer_types": TWO},
    },
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_count_foretells_passes_of_other_shapes(kind: str) -> None:
    """Within a quarter, and hardly below."""
    own = model(kind)
    found = counting.count(own)
    assert found is not None
    for rows, length in ((3, 300), (2, 700), (4, 60), (1, 100)):
        taken = counting._alive(own, (rows, length))
        foretold = Counted(**found).of_a_pass(rows * length, length, 4)
        assert 0.93 < foretold / taken < 1.25, (rows, length)


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3"])
def test_scores_that_a_wide_layer_hides_are_counted(kind: str) -> None:
    """In rows of 512 tokens the FFN takes more, in longer ones what attention keeps of pairs."""
    torch.manual_seed(0)
    wide = {"intermediate_size": 2048, "moe_intermediate_size": 2048}
    config = AutoConfig.for_model(kind, **{**KINDS[kind], **wide})
    own = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = counting.count(own)
    assert found is not None
    foretold = Counted(**found).of_a_pass(2 * 1500, 1500, 4)
    assert 0.93 < foretold / counting._alive(own, (2, 1500)) < 1.25


def test_what_no_configuration_names_is_counted() -> None:
    """Of these kinds most of what a pass holds follows from no size that is read."""
    for kind, least in (("bamba", 3), ("jamba", 2), ("deepseek_v3", 2)):
        found = counting.count(model(kind))
        assert found is not None
        counted = Counted(**found).of_a_pass(8 * 512, 512, 4)
        assert counted > least * 8 * 512 * 4 * (6 * 32 + 5 * 64), kind


def test_rows_of_a_scan_are_filled_and_others_are_not() -> None:
    filled = {kind: (counting.count(model(kind)) or {})["filled"] for kind in KINDS}
    assert filled["bamba"] == 256
    assert filled["qwen3_next"] == 64
    assert [filled[kind] for kind in ("llama", "jamba", "deepseek_v3", "gpt_oss")] == [1] * 4


def test_keys_and_states_are_counted_as_the_cache_has_them() -> None:
    found = counting.count(model("llama"))
    assert found is not None
    # Keys and values of two heads of 8, in two layers.
    assert (found["kept_token"], found["kept_row"]) == (2 * 2 * 2 * 8 * 4, 0)
    scan = counting.count(model("bamba"))
    assert scan is not None
    assert scan["kept_token"] == found["kept_token"] / 2
    # Eight heads of 8 channels with 8 numbers each, and what the convolution sees again.
    assert scan["kept_row"] >= 8 * 8 * 8 * 4


def test_a_table_of_positions_is_not_left() -> None:
    assert counting.count(tiny_model("gpt2")) is not None


def test_a_model_that_ends_behind_a_length_is_counted_within_it() -> None:
    """MPT's ALiBi is made for 32 positions, and no table says so."""
    torch.manual_seed(0)
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 32}
    config = AutoConfig.for_model("mpt", vocab_size=64, **sizes)
    found = counting.count(AutoModelForCausalLM.from_config(config).eval())
    assert found is not None
    assert found["token"] > 0


def test_logits_are_not_counted() -> None:
    """They are looked at by themselves, however wide a vocabulary is."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**KINDS["llama"], "vocab_size": 50_000})
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert counting.count(wide) == counting.count(model("llama"))


class Doubling(nn.Module):
    """Holds its input, one tensor twice as wide, and then a sum of it."""

    def forward(self, values: Tensor) -> Tensor:
        twice = torch.cat([values, values], dim=-1)
        del values
        return twice.sum(-1)


def test_bytes_are_those_alive_at_once() -> None:
    llama = model("llama")
    with counting._Alive(llama) as seen:
        first = torch.zeros(100)
        second = torch.zeros(50)
        del first
        third = torch.zeros(60)
        view = third[10:]
        del second
    assert seen.most == 4 * 150
    assert seen._now == 4 * 60 == view.untyped_storage().nbytes()
    with counting._Alive(llama) as seen:
        Doubling()(torch.zeros(10, 8))
    assert seen.most == 4 * (80 + 160 + 10)


def test_short_rows_take_what_a_layer_does_beside_attention() -> None:
    counted = Counted(item=4, token=10, pair=2, row=5, short=40)
    assert counted.of_a_pass(3 * 100, 100, 4) == 300 * (10 + 200) + 3 * 5
    assert counted.of_a_pass(3 * 10, 10, 4) == 30 * 40
    # No less in a narrower type: what is in float32 stays in it.
    long = replace(counted, scored=8, score=3)
    assert long.of_a_pass(3 * 100, 100, 4) == 300 * (8 + 300)
    assert counted.of_a_pass(30, 10, 2) == counted.of_a_pass(30, 10, 4)
    assert replace(counted, item=2).of_a_pass(30, 10, 4) == 2 * 30 * 40
    assert Counted(item=4, token=10, filled=64).of_a_pass(4 * 30, 30, 4) == 4 * 64 * 10


def test_an_estimate_takes_the_count_where_there_is_one() -> None:
    plain = Sizes(
        parameters=1, hidden=512, width=1024, layers=2, vocabulary=8, pieces=True, heads=8, cache=4
    )
    counted = replace(plain, counted=Counted(item=4, token=50_000, kept_row=3000))
    batch = Largest(4 * 256, 256, 4)
    assert of_a_pass(counted, batch, 4, "cuda", 0) == 1024 * 50_000
    assert of_a_pass(counted, batch, 4, "cpu", 0) == 1024 * 50_000 + 32 * 2**20
    kept = replace(batch, kept=1024)
    more = of_a_pass(counted, kept, 4, "cuda", 0) - of_a_pass(counted, batch, 4, "cuda", 0)
    assert more == max(1024 * 4 * 4, 4 * 3000)
