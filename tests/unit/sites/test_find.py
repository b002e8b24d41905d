"""The search finds every FFN with the right roles, proves it, and says clearly when it cannot."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from model_parts import attentions_of, ffns_of, find_ffns, shown
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.activation import ACTIVATIONS
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.find import (
    Part,
    bind_parts,
    describe_parts,
    find_parts,
    observe,
)
from sparsity_atlas.sites.part import sites_of
from sparsity_atlas.sites.probe.ffn_probe import Search
from sparsity_atlas.terms import ATTENTION_SITES, FFN_SITES
from tiny_models import (
    ARCHITECTURES,
    GROUPED,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Layouts,
    Strange,
    tiny_model,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("one_thread")

UNGATED_SITES = ("input", "intermediate", "all_inputs")

# What the source of each architecture says: up, gate, halves of a fused projection, down.
ROLES = {
    "llama": ("mlp.up_proj", "mlp.gate_proj", None, "mlp.down_proj"),
    "llama-square": ("mlp.up_proj", "mlp.gate_proj", None, "mlp.down_proj"),
    "gemma2": ("mlp.up_proj", "mlp.gate_proj", None, "mlp.down_proj"),
    "cohere": ("mlp.up_proj", "mlp.gate_proj", None, "mlp.down_proj"),
    "lfm2": ("feed_forward.w3", "feed_forward.w1", None, "feed_forward.w2"),
    "phi3": ("mlp.gate_up_proj", "mlp.gate_up_proj", (1, 0), "mlp.down_proj"),
    "phi3-half": ("mlp.gate_up_proj", "mlp.gate_up_proj", (1, 0), "mlp.down_proj"),
    "glm4": ("mlp.gate_up_proj", "mlp.gate_up_proj", (1, 0), "mlp.down_proj"),
    "gpt2": ("mlp.c_fc", None, None, "mlp.c_proj"),
    "gptj": ("mlp.fc_in", None, None, "mlp.fc_out"),
    "opt": ("fc1", None, None, "fc2"),
    "gpt_neox": ("mlp.dense_h_to_4h", None, None, "mlp.dense_4h_to_h"),
    "falcon": ("mlp.dense_h_to_4h", None, None, "mlp.dense_4h_to_h"),
    "bloom": ("mlp.dense_h_to_4h", None, None, "mlp.dense_4h_to_h"),
    "mpt": ("ffn.up_proj", None, None, "ffn.down_proj"),
    "ctrl": ("ffn.0", None, None, "ffn.2"),
    "rwkv": ("feed_forward.key", None, None, "feed_forward.value"),
}
# layout of `Strange`: up, gate, halves, activation.
LAYOUTS = {
    "gate_up": ("qov", "qov", (1, 0), "silu"),
    "up_gate": ("qov", "qov", (0, 1), "gelu_pytorch_tanh"),
    "ungated": ("qov", None, None, "relu2"),
    "gated": ("qov", "mub", None, "sigmoid"),
    "gated-in-place": ("qov", "mub", None, "silu"),
    "gated-shared": ("qov", "mub", None, "act"),
    "flattened": ("qov", "mub", None, "silu"),
    "maps": ("w8", "w3", None, "gelu"),
}
NO_FFN = (
    *("parameters", "interleaved", "ungated-linear", "ungated-norm", "ungated-dropout"),
    *("bilinear", "scaled", "other-input"),
)


def roles(ffn: FFN, layer: str) -> tuple:
    """The modules' paths below the layer, as in the tables above."""

    def below(path: str) -> str:
        return path.partition(f".{layer}.")[2]

    halves = None if ffn.up.half is None else (ffn.up.half, ffn.gate.half)
    gate = below(ffn.gate.path) if ffn.gate is not None else None
    return below(ffn.up.path), gate, halves, below(ffn.down.path)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_proved(model: nn.Module, parts: list[Part]) -> None:
    """Check the FFNs in a forward pass over other tokens than the probe's, with hooks of our own."""
    ffns = ffns_of(parts)
    ids = token_ids()
    with torch.no_grad():
        untouched = model(ids)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for ffn in ffns:

        def record(
            module: nn.Module, args: tuple, kwargs: dict, output: Tensor, layer: int = ffn.layer
        ) -> None:
            (given,) = (*args, *kwargs.values())
            inputs[layer] = given.clone()
            outputs[layer] = output.clone()

        handles.append(ffn.down.module.register_forward_hook(record, with_kwargs=True))
    seen: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, name: str, tensor: Tensor) -> None:
        assert (layer, name) not in seen
        seen[layer, name] = tensor.clone()

    sites = sites_of(parts)
    with torch.no_grad(), observe(parts, sites, shown(keep)):
        watched = model(ids)
    for handle in handles:
        handle.remove()

    assert set(seen) == {(part.layer, name) for part in parts for name in part.tensors}
    logits, before = (getattr(output, "logits", output) for output in (watched, untouched))
    assert torch.equal(logits, before)
    for ffn in ffns:
        x, i = seen[ffn.layer, "input"], seen[ffn.layer, "intermediate"]
        assert x.shape == (*ids.shape, ffn.hidden)
        assert i.shape == (*ids.shape, ffn.width)
        assert torch.equal(i, inputs[ffn.layer].view_as(i))
        with torch.no_grad():
            u, g = ffn.factors(x)
            assert relative(ffn.intermediate(x), i) < 1e-5
            output = ffn.down(ffn.intermediate(x))
        assert relative(output, outputs[ffn.layer].view_as(output)) < 1e-5
        if g is None or ffn.norm is not None:
            assert u.shape == i.shape
        else:
            assert relative(u * g, i) < 1e-5
            assert relative(seen[ffn.layer, "up"] * seen[ffn.layer, "gate"], i) < 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_found_and_proved(name: str) -> None:
    model = tiny_model(name)
    parts = find_parts(model)
    ffns = ffns_of(parts)
    assert [ffn.layer for ffn in ffns] == list(range(model.config.num_hidden_layers))
    assert {ffn.hidden for ffn in ffns} == {HIDDEN}
    own = FFN_SITES if ffns[0].gated else UNGATED_SITES
    assert sites_of(parts) in (own, (*own, *ATTENTION_SITES))
    assert_proved(model, parts)


@pytest.mark.parametrize("name", ROLES)
def test_roles_are_those_of_the_source(name: str) -> None:
    for layer, ffn in enumerate(find_ffns(tiny_model(name))):
        assert roles(ffn, str(layer)) == ROLES[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3", "gpt2", "opt", "lfm2"])
def test_half_precision_finds_the_same(name: str, dtype: torch.dtype) -> None:
    expected = [ffn.describe() for ffn in find_ffns(tiny_model(name))]
    assert [ffn.describe() for ffn in find_ffns(tiny_model(name, dtype))] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3", "lfm2"])
def test_roles_are_told_apart_where_weights_are_tiny(name: str, dtype: torch.dtype) -> None:
    # Near zero u ⊙ silu(g) is u ⊙ g / 2, the same with the roles exchanged.
    ffns = find_ffns(tiny_model(name, dtype, initializer_range=1e-5))
    assert roles(ffns[0], "0") == ROLES[name]


def test_an_activation_module_is_preferred_to_an_equal_function() -> None:
    for ffn in find_ffns(tiny_model("llama")):
        assert ffn.activation.path == f"model.layers.{ffn.layer}.mlp.act_fn"
        assert ffn.activation.module is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_that_say_nothing(layout: str) -> None:
    model = Strange(layout, layers=3)
    ffns = find_ffns(model)
    assert len(ffns) == 3
    up, gate, halves, activation = LAYOUTS[layout]
    for layer, ffn in enumerate(ffns):
        found_up, found_gate, found_halves, _ = roles(ffn, str(layer))
        assert (found_up, found_gate) == (f"k3.{up}", gate and f"k3.{gate}")
        assert found_halves == halves
        assert ffn.activation.name == activation
    assert_proved(model, ffns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functional_activations_are_told_apart(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsity_atlas.sites.activation import activation_function

    function = activation_function(name)
    monkeypatch.setattr(
        Layouts, "forward", lambda self, x: self.arx(self.qov(x) * function(self.mub(x)))
    )
    ffns = find_ffns(Strange("gated").to(dtype))
    assert roles(ffns[0], "0")[:2] == ("k3.qov", "k3.mub")
    if dtype == torch.float32:
        assert ffns[0].activation.name == name
    else:
        # Some are the same function of bfloat16 numbers.
        points = torch.linspace(-10, 10, 999).to(dtype)
        found = ffns[0].activation.function(points)
        assert relative(found.float(), function(points).float()) < 1e-3


@pytest.mark.parametrize("layout", NO_FFN)
def test_what_is_no_known_ffn_is_refused_with_the_tree(layout: str) -> None:
    with pytest.raises(AtlasError) as caught:
        find_ffns(Strange(layout))
    message = str(caught.value)
    assert "\n" not in message
    assert "Strange: found 0 FFNs" in message
    assert "yy.0 is {k1: LayerNorm, k2: {jx: Linear(16→16), ky: Linear(16→16)}, k3: " in message
    assert 'modules: {up: "yy.{layer}.<up>"' in message


class Bent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(())


@pytest.mark.parametrize(
    ("kind", "name", "equation"),
    [
        (Bent, "qov", "up is affine"),
        (Bent, "mub", "gate is affine"),
        (Bent, "arx", "down is affine"),
        (Noisy, "qov", "intermediate(x) = input of the down projection"),
        (Noisy, "arx", "down(i) = the FFN's output"),
    ],
)
def test_what_only_looks_like_an_ffn_fails_on_the_models_own_numbers(
    kind: type[nn.Linear], name: str, equation: str
) -> None:
    model = Strange("gated")
    for block in model.yy:
        old = getattr(block["k3"], name)
        setattr(block["k3"], name, kind(old.in_features, old.out_features))
    with pytest.raises(AtlasError, match=f"layer 0 .*: {re.escape(equation)} does not hold"):
        find_ffns(model)


def test_numbers_that_overflow_are_called_so() -> None:
    model = Strange("gated")
    with torch.no_grad():
        model.yy[0]["k3"].qov.weight *= 1e30
    with pytest.raises(
        AtlasError, match=r"layer 0 .*: NaN or infinity comes up .* large for float32"
    ):
        find_ffns(model)


def test_the_layer_without_an_ffn_is_the_one_that_is_shown() -> None:
    model = Strange("gated", layers=3)
    model.yy[1]["k3"] = Layouts("scaled").eval()
    with pytest.raises(AtlasError, match=r"found 2 FFNs .*; yy\.1 is .*yy\.1\.k3\.qov ⊙ "):
        find_ffns(model)


STATE_SPACE = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "state_size": 4}
MAMBA2 = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
ZAMBA2 = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 40},
    **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    **{"hybrid_layer_ids": [1, 3], "num_attention_heads": 2, "attention_head_dim": 16},
    **{"mamba_d_state": 4, "n_mamba_heads": 4, "mamba_headdim": 8, "mamba_ngroups": 1},
    **{"chunk_size": 4, "adapter_rank": 4, "use_mamba_kernels": False},
}
NEMOTRON_H = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 40},
    **{"num_hidden_layers": 4, "hybrid_override_pattern": "M-*-", "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4},
    **{"n_groups": 1, "chunk_size": 4},
}


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("mamba", STATE_SPACE, "a state-space model: its layers have no FFN"),
        ("falcon_mamba", STATE_SPACE, "a state-space model: its layers have no FFN"),
        ("mamba2", STATE_SPACE | MAMBA2, "a state-space model: its layers have no FFN"),
        ("zamba2", ZAMBA2, r"layers\.1 and model\.layers\.3 share .*: layers that share"),
    ],
)
def test_layers_without_an_ffn_of_their_own(kind: str, settings: dict[str, Any], says: str) -> None:
    """Nobody is told to name what is not there."""
    config = AutoConfig.for_model(kind, **{"num_hidden_layers": 2, **settings})
    with pytest.raises(AtlasError, match=says) as caught:
        find_ffns(AutoModelForCausalLM.from_config(config))
    assert "modules:" not in str(caught.value)


def test_a_model_whose_ffns_are_not_found_is_refused() -> None:
    """Its factors are scaled, each entry by its own number, and their product is normalised."""
    config = AutoConfig.for_model("dory", **GROUPED)
    with pytest.raises(
        AtlasError, match=r"found 0 FFNs .* name its modules in the config: modules:"
    ):
        find_ffns(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(("name", "dense"), [("mixtral", 0), ("qwen2_moe", LAYERS), ("gpt_oss", 0)])
def test_of_mixtures_of_experts_the_shared_experts_are_ffns(name: str, dense: int) -> None:
    ffns = find_ffns(tiny_model(name))
    assert [ffn.name for ffn in ffns] == ["shared"] * dense


def test_experts_outside_the_interface_are_refused() -> None:
    with pytest.raises(
        AtlasError, match=r"mlp\.input_linear .* holds experts that do not go through"
    ):
        find_ffns(tiny_model("jetmoe"))


def test_experts_of_a_model_that_no_library_has_are_refused() -> None:
    model = Strange("gated")
    model.yy[1]["experts"] = nn.ModuleList(Layouts("gated") for _ in range(2))
    with pytest.raises(AtlasError, match=r"yy\.1\.experts .* holds experts"):
        find_ffns(model)

    model = Strange("gated")
    model.yy[1]["bank"] = nn.ParameterList([torch.zeros(4, WIDTH, HIDDEN)])
    assert len(find_ffns(model)) == LAYERS
    model.config = PreTrainedConfig(num_hidden_layers=LAYERS, num_local_experts=4)
    with pytest.raises(AtlasError, match=r"yy\.1\.bank .* holds experts"):
        find_ffns(model)


def test_batches_with_the_tokens_first_are_refused() -> None:
    config = AutoConfig.for_model(
        "xlnet", vocab_size=VOCABULARY, d_model=HIDDEN, n_layer=2, n_head=2, d_inner=WIDTH
    )
    with pytest.raises(AtlasError, match="packed or transposed"):
        find_ffns(AutoModelForCausalLM.from_config(config))


def test_a_shared_ffn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: what bounds and norms do, which takes minutes of many rounds, is not looked for."""
    model = Strange("gated")
    model.calls = 2
    monkeypatch.setattr(Search, "_shaped", None)
    with pytest.raises(AtlasError, match="2 calls in one forward pass"):
        find_ffns(model)
    model.calls = 1
    model.yy[1]["k3"] = model.yy[0]["k3"]
    with pytest.raises(AtlasError, match=r"yy\.\d"):
        find_ffns(model)


def test_an_ffn_outside_the_decoder_is_left_out() -> None:
    model = Strange("gated")
    model.fin = nn.Sequential(
        *(nn.Linear(HIDDEN, WIDTH), nn.ReLU(), nn.Linear(WIDTH, HIDDEN)),
        nn.Linear(HIDDEN, VOCABULARY),
    )
    ffns = find_ffns(model)
    assert [ffn.down.path for ffn in ffns] == ["yy.0.k3.arx", "yy.1.k3.arx"]
    # Where the configuration names a number of layers, a longer list is not mistaken for them.
    model.yz = nn.ModuleList(
        nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.ReLU(), nn.Linear(WIDTH, HIDDEN))
        for _ in range(LAYERS + 1)
    )
    model.fin = nn.Sequential(*model.yz, nn.Linear(HIDDEN, VOCABULARY))
    model.config = PreTrainedConfig(num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    assert [ffn.down.path for ffn in find_ffns(model)] == [ffn.down.path for ffn in ffns]


def test_projections_made_of_several_modules_are_taken_as_a_whole() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    assert roles(find_ffns(model)[0], "0") == ROLES["llama"]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[0].mlp.train()
    training = {name for name, module in model.named_modules() if module.training}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    find_ffns(model)
    assert {name for name, module in model.named_modules() if module.training} == training
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert_no_hooks(model)


def test_no_hook_stays_after_an_error() -> None:
    model = Strange("scaled")
    with pytest.raises(AtlasError):
        find_ffns(model)
    assert_no_hooks(model)


def assert_no_hooks(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "lfm2"])
def test_a_description_binds_without_a_probe(name: str) -> None:
    stored = json.loads(json.dumps(describe_parts(find_parts(tiny_model(name)))))
    model = tiny_model(name)
    bound = bind_parts(model, stored)
    assert describe_parts(bound) == stored
    assert len(ffns_of(bound)) == LAYERS or name == "lfm2"
    assert_proved(model, bound)


def test_a_description_from_before_attention_was_looked_for_binds() -> None:
    stored = describe_parts(find_parts(tiny_model("llama")))
    for entry in stored:
        del entry["attention"]
    bound = bind_parts(tiny_model("llama"), stored)
    assert (len(ffns_of(bound)), attentions_of(bound)) == (LAYERS, [])


def test_a_shared_activation_binds_as_shared() -> None:
    model = Strange("gated-shared")
    bound = bind_parts(model, describe_parts(find_parts(model)))
    assert [ffn.activation.module for ffn in ffns_of(bound)] == [None, None]
    assert_proved(model, bound)


def test_a_description_of_another_model_is_refused() -> None:
    stored = describe_parts(find_parts(tiny_model("llama")))
    with pytest.raises(AtlasError, match=r"model\.layers\.0\.mlp\.up_proj: .* no such module"):
        bind_parts(tiny_model("gpt2"), [{**one, "attention": None} for one in stored])
