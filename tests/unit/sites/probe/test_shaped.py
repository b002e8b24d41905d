"""Bounds, offsets and cuts of factors, norms of their product, and layers without an FFN."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from model_parts import attentions_of, ffns_of, find_ffns, shown
from sparsity_atlas.activations.layout import groups
from sparsity_atlas.sites.find import (
    bind_parts,
    describe_parts,
    find_parts,
    observe,
    sites_of,
    transform,
)
from sparsity_atlas.sites.part import measure
from sparsity_atlas.sites.shaping import PLAIN, Shaping
from sparsity_atlas.sparsify.counted_vectors import slots_of
from sparsity_atlas.terms import ATTENTION_SITES, FFN_SITES
from tiny_models import CUT, GROUPED, HIDDEN, VOCABULARY, Strange, tiny_model, token_ids, top_tail

pytestmark = pytest.mark.usefixtures("one_thread")

UNGATED = ("input", "intermediate", "all_inputs")
# What the source of each layout says: of u, of the gate, and σ.
SHAPED = {
    "clamped": (Shaping(-7.0, 7.0), PLAIN, "silu"),
    "clamped-shifted": (Shaping(-7.0, 7.0, plus=1.0), Shaping(high=7.0), "quick_gelu"),
    "clamped-shared": (Shaping(-10.0, 10.0), Shaping(high=10.0), "act"),
    "rectified": (Shaping(0.0), PLAIN, "relu"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", SHAPED)
def test_bounds_are_those_of_the_source(layout: str, dtype: torch.dtype) -> None:
    for ffn in find_ffns(Strange(layout).to(dtype)):
        assert (ffn.shaping, ffn.activation.before, ffn.activation.name) == SHAPED[layout]


def test_a_bound_behind_the_activation_is_one_before_it() -> None:
    """What rises to 7 as its argument rises, and is kept there, stands still from that argument on."""
    for ffn in find_ffns(Strange("clamped-after")):
        assert ffn.shaping == Shaping(-7.0, 7.0)
        high = ffn.activation.before.high
        assert high is not None
        assert float(F.silu(torch.tensor(high))) == pytest.approx(7, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cut_of_a_gate_is_found(dtype: torch.dtype) -> None:
    for ffn in find_ffns(Strange("cut").to(dtype)):
        cut = ffn.activation.before.cut
        assert cut == pytest.approx(CUT, abs=1e-5 if dtype == torch.float32 else 0.01)


def test_what_shapes_do_by_hand() -> None:
    values = torch.tensor([[-9.0, -1.0, 0.0, 2.0, 8.0]])
    assert Shaping(-7.0, 4.0, plus=1.0)(values).tolist() == [[-6.0, 0.0, 1.0, 3.0, 5.0]]
    assert torch.equal(Shaping(cut=0.5)(values), top_tail(values, 0.5))
    assert PLAIN(values) is values
    assert Shaping(**Shaping(high=2.0).describe()) == Shaping(high=2.0)
    # A bound of zero is one.
    assert Shaping(**Shaping(low=0.0).describe()) == Shaping(low=0.0) != PLAIN
    assert PLAIN.describe() == {}


@pytest.mark.parametrize("layout", [*SHAPED, "clamped-after", "cut", "normed"])
def test_a_description_binds_without_a_probe(layout: str) -> None:
    stored = json.loads(json.dumps(describe_parts(find_parts(Strange(layout)))))
    bound = bind_parts(Strange(layout), stored)
    assert describe_parts(bound) == stored
    ffn = ffns_of(bound)[0]
    seen: dict[str, Tensor] = {}

    def keep(layer: int, tensor: str, values: Tensor) -> None:
        if layer == 0:
            seen[tensor] = values.clone()

    with torch.no_grad(), observe(bound, ["all_inputs"], shown(keep)):
        ffn.model(token_ids())
        again = ffn.intermediate(seen["input"])
    torch.testing.assert_close(again, seen["intermediate"])


def test_behind_a_norm_there_is_what_the_down_projection_reads() -> None:
    """`intermediate` is the norm of u ⊙ g, and what is dropped of it changes no other entry."""
    model = Strange("normed")
    parts = find_parts(model)
    assert sites_of(parts) == (*UNGATED, *ATTENTION_SITES)
    ffn = ffns_of(parts)[0]
    block = model.yy[0]["k3"]
    assert ffn.norm is not None
    assert ffn.norm.module is block.nor
    x = torch.randn(2, 3, HIDDEN)
    with torch.no_grad():
        product = block.qov(x) * F.silu(block.mub(x))
        torch.testing.assert_close(ffn.intermediate(x), block.nor(product))
        kept = torch.rand(product.shape) < 0.5
        dropped = ffn.run({"input": x}, "intermediate", lambda _, write: write * kept)
        torch.testing.assert_close(dropped, block.arx(block.nor(product) * kept))


def test_bitnet_has_the_sites_that_its_norm_leaves() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bitnet", **GROUPED)).eval()
    parts = find_parts(model)
    # Its attention, too, has a norm before the output map.
    assert sites_of(parts) == UNGATED
    for layer, ffn in enumerate(ffns_of(parts)):
        assert ffn.norm is not None
        assert ffn.norm.path == f"model.layers.{layer}.mlp.ffn_sub_norm"


def gemma3n() -> Any:
    """Two layers, of which one cuts its gate at the quantile .9 of a normal distribution."""
    settings: dict[str, Any] = {
        **{key: value for key, value in GROUPED.items() if key != "intermediate_size"},
        **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
        **{"intermediate_size": [64, 64], "activation_sparsity_pattern": [0.9, 0.0]},
        **{"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
        **{"laurel_rank": 4, "hidden_size": 32, "initializer_range": 0.3},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3n_text", **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def test_gemma_3n_drops_exactly_what_it_says() -> None:
    """Its zeros are seen at `gate` and `intermediate`, and nowhere else."""
    model = gemma3n()
    parts = find_parts(model)
    assert set(FFN_SITES) <= set(sites_of(parts))
    first, second = ffns_of(parts)
    normal = torch.distributions.Normal(0.0, 1.0)
    assert first.activation.before.cut == pytest.approx(
        float(normal.icdf(torch.tensor(0.9))), abs=1e-4
    )
    assert second.activation.before == PLAIN
    zeros: dict[tuple[int, str], float] = {}

    def count(layer: int, tensor: str, values: Tensor) -> None:
        zeros[layer, tensor] = float((values == 0).float().mean())

    with torch.no_grad(), observe(parts, FFN_SITES, shown(count)):
        model(token_ids())
    assert zeros[0, "gate"] == zeros[0, "intermediate"] > 0.7
    # An activation that rounds to zero here and there.
    assert max(zeros[0, "up"], zeros[0, "input"], zeros[1, "up"], zeros[1, "gate"]) < 0.01


NEMOTRON_H: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 40},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    **{
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "chunk_size": 4,
    },
}


def nemotron_h(pattern: str) -> nn.Module:
    config = AutoConfig.for_model(
        "nemotron_h",
        num_hidden_layers=len(pattern),
        hybrid_override_pattern=pattern,
        **NEMOTRON_H,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.mark.parametrize(
    ("pattern", "ffns", "attentions"),
    [("M-*-", [1, 3], [2]), ("MM-M", [2], []), ("*-", [1], [0])],
)
def test_layers_keep_the_decoder_s_numbers(
    pattern: str, ffns: list[int], attentions: list[int]
) -> None:
    """A layer without a part is absent; its number is nobody else's."""
    parts = find_parts(nemotron_h(pattern))
    assert [one.layer for one in ffns_of(parts)] == ffns
    assert [one.layer for one in attentions_of(parts)] == attentions
    assert sites_of(parts) == (*UNGATED, *(ATTENTION_SITES if attentions else ()))
    assert measure(parts)["layers"] == len(pattern)
    stored = json.loads(json.dumps(describe_parts(parts)))
    again = bind_parts(nemotron_h(pattern), stored)
    assert describe_parts(again) == stored
    assert [(one.layer, one.name) for one in again] == [(one.layer, one.name) for one in parts]
    # What is stored, and counted, has the same numbers.
    kept = groups(stored, sites_of(parts))
    assert list(kept["input"].shapes) == list(kept["intermediate"].shapes) == ffns
    assert list(kept["o_input"].shapes if attentions else ()) == attentions
    slots = slots_of(again, None)
    assert {slot.key.layer for slot in slots if slot.key.part == "ffn"} == set(ffns)
    assert {slot.key.layer for slot in slots if slot.key.part == "attention"} == set(attentions)
    seen: list[tuple[int, str]] = []
    with (
        torch.no_grad(),
        transform(again, "all_inputs", shown(lambda layer, name, _: seen.append((layer, name)))),
    ):
        again[0].model(token_ids(), use_cache=False)
    assert seen == [(layer, name) for layer in ffns for name in ("input", "intermediate")]


def test_an_ffn_that_is_not_proved_is_not_a_layer_without_one() -> None:
    """Its maps are no attention's."""
    model = tiny_model("llama")
    block: Any = model.get_submodule("model.layers.1.mlp")
    block.act_fn = nn.Softmax(dim=-1)
    with pytest.raises(
        Exception, match=r"found 1 FFNs that a probe proves, expected one in each of 2"
    ):
        find_parts(model)
