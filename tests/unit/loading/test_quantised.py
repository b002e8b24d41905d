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
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.place import matrix, places
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import blank, load
from sparsity_atlas.loading.quantised import KEY, unpack
from sparsity_atlas.models import manifest as models
from sparsity_atlas.models.parameters import count_parameters
from sparsity_atlas.sites.find import find_parts, sites_of
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import SITES
from tiny_lm import save_model
from tiny_models import tiny_model, token_ids

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
        ({"model_type": "llama", "quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
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
        rows, columns = value.shape
        # The last blocks may be parts of one.
        whole = nn.functional.pad(value, (0, -columns % block, 0, -rows % block))
        tiles = whole.unflatten(1, (-1, block)).unflatten(0, (-1, block))
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        short = (tiles / scale).to(torch.float8_e4m3fn)
        plain[name] = (short.float() * scale).reshape(whole.shape)[:rows, :columns]
        stored[name] = short.reshape(whole.shape)[:rows, :columns].contiguous()
        stored[f"{name}_scale_inv"] = scale.reshape(scale.shape[0], scale.shape[2])
    save_file(stored, path, metadata={"format": "pt"})
    _say(folder, {**FP8, "weight_block_size": [block, block]})
    return plain


def _say(folder: Path, how: dict[str, Any]) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), "dtype": "bfloat16", "quantization_config": how}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("hidden", "width"), [(32, 48), (24, 40)])
def test_fp8_in_plain_numbers(hidden: int, width: int, tmp_path: Path) -> None:
    """Also where blocks of 16 do not fill a map: even shares of 24 are two of 12, of 40 none."""
    folder = save_model(tmp_path, **{**SIZES, "hidden_size": hidden, "intermediate_size": width})
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


def test_what_rounds_the_inputs_of_packed_maps_alone(tmp_path: Path) -> None:
    """Scales that were fixed beforehand, one a map; anything else that the model lacks is still refused."""
    folder = save_model(tmp_path, **SIZES)
    plain = quantise_fp8(folder)
    path = folder / "model.safetensors"
    stored = load_file(path)
    maps = [name.removesuffix("weight") for name in plain if "_proj" in name]
    for end in ("input_scale", "input_zero_point", "output_scale"):
        stored |= {f"{name}{end}": torch.ones(1) for name in maps}
    save_file(stored, path, metadata={"format": "pt"})
    model = load(Checkpoint(folder, dequantise=True), device="cpu")
    assert set(dict(model.named_parameters())) == set(plain)
    save_file({**stored, f"{maps[0]}odd_scale": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(AtlasError, match=r"1 tensor is not expected \(\S+odd_scale\)"):
        load(Checkpoint(folder, dequantise=True), device="cpu")


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


GPTQ, AWQ, BNB = ({"quant_method": name, "bits": 4} for name in ("gptq", "awq", "bitsandbytes"))


@pytest.mark.parametrize(
    ("how", "dequantise", "says"),
    [
        (GPTQ, True, r"\(gptq\): transformers does not turn it into plain numbers; without"),
        (AWQ, True, r"\(awq\): transformers does not turn it into plain numbers; without"),
        ({"quant_method": "hqq"}, True, r"\(hqq\): not supported; known: fp8, .*, gptq, awq; take"),
        (
            {"quant_method": "hqq"},
            False,
            r"\(hqq\): not supported; known: fp8, .*, gptq, awq; take",
        ),
        (FP8, False, r"\(fp8\): say dequantise: true in the model's entry"),
        (PACKED, True, "needs the package compressed-tensors: pip install compressed-tensors"),
        (PACKED, False, "needs the package compressed-tensors: pip install compressed-tensors"),
        (BNB, True, "needs the package bitsandbytes: pip install bitsandbytes"),
        (BNB, False, "needs the package bitsandbytes: pip install bitsandbytes"),
        (GPTQ, False, "needs the package optimum: pip install optimum"),
        (AWQ, False, "needs the package gptqmodel: pip install gptqmodel"),
        (None, True, "dequantise: true, but its config.json names no quantisation"),
    ],
)
def test_what_cannot_be_used(
    how: dict[str, Any] | None,
    dequantise: bool,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line, before a weight is read: it names the package, or what to say."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    content = {"model_type": "llama"} if how is None else {"model_type": "llama", KEY: how}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(AtlasError, match=says) as caught:
        Checkpoint(tmp_path, dequantise=dequantise).config()
    assert "\n" not in str(caught.value)


def test_an_adapter_is_merged_into_numbers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: object())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", KEY: BNB}))
    with pytest.raises(
        AtlasError, match=r"an adapter is merged into plain numbers, .*dequantise: t"
    ):
        Checkpoint(tmp_path, adapter=tmp_path).config()


def test_packed_and_in_plain_numbers_are_two_models(tmp_path: Path) -> None:
    """What was captured of one is not taken for the other's."""
    folder = save_model(tmp_path)
    plain = Checkpoint(folder).digest()
    _say(folder, BNB)
    digests = {Checkpoint(folder, dequantise=one).digest() for one in (False, True)}
    assert len({plain, *digests}) == 3


class Packed(nn.Module):
    """A quantised map as the libraries make them: whole numbers, a scale a row, and sizes by name."""

    def __init__(self, plain: nn.Linear, *, stored: torch.dtype = torch.int8) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (plain.weight / scale).round().to(stored).flatten())
        self.register_buffer("scale", scale.detach().flatten())
        self.bias = plain.bias

    def numbers(self) -> torch.Tensor:
        """What it stands for."""
        return self.packed.view(self.out_features, -1).float() * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.numbers().to(x.dtype), self.bias)


def packed_model() -> nn.Module:
    """A tiny Llama of which every map of its layers is `Packed`."""
    model = tiny_model("llama", initializer_range=0.3)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Packed(module))
    return model


def test_packed_maps_are_found_and_their_weights_are_what_they_stand_for() -> None:
    plain, packed = tiny_model("llama", initializer_range=0.3), packed_model()
    parts = find_parts(packed)
    assert sites_of(parts) == SITES
    assert count_parameters(packed, parts) == count_parameters(plain)
    for place in places(parts, "all_linear_inputs"):
        expected = torch.cat([one.module.numbers() for one in place.readers()])
        torch.testing.assert_close(place.weight, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(place.column_norms(), expected.norm(dim=0), rtol=1e-5, atol=1e-6)
        rows = torch.randn(3, place.width)
        made = [one.module(rows) for one in place.readers()]
        torch.testing.assert_close(place.outputs(rows), torch.cat(made, -1))


# Which of eight outputs lies in which four bits of a word, from the lowest, and inputs that share a scale.
AWQ_ORDER, AWQ_GROUP = (0, 2, 4, 6, 1, 3, 5, 7), 16


class PackedByAwq(nn.Module):
    """A map in AWQ's layout: `qweight` [in, out / 8], and `qzeros` and `scales` of each group of inputs.

    Its weight [out, in] is (q - z) · scale, and it multiplies what it reads by that.
    """

    def __init__(self, weight: torch.Tensor, step: float) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        groups = self.in_features // AWQ_GROUP
        whole = (weight.T / step).round().to(torch.int64) + 8
        assert torch.equal(whole, whole.clamp(0, 15))
        zeros = torch.full((groups, self.out_features), 8)
        self.register_buffer("qweight", self.words(whole))
        self.register_buffer("qzeros", self.words(zeros))
        self.register_buffer("scales", torch.full((groups, self.out_features), step))

    @staticmethod
    def words(whole: torch.Tensor) -> torch.Tensor:
        parts = whole.unflatten(1, (-1, 8))[..., AWQ_ORDER] << torch.arange(0, 32, 4)
        return parts.sum(-1).to(torch.int32)

    @staticmethod
    def whole(words: torch.Tensor) -> torch.Tensor:
        parts = (words[..., None] >> torch.arange(0, 32, 4)) & 15
        return parts[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros, scales = (
            one.repeat_interleave(AWQ_GROUP, 0) for one in (self.whole(self.qzeros), self.scales)
        )
        return x @ ((self.whole(self.qweight) - zeros) * scales).to(x.dtype)


def test_columns_that_awq_scales_are_those_that_meet_the_scaled_input() -> None:
    """It multiplies a map's column j by s_j, and what makes x_j by 1 / s_j: |x_j| · ‖W[:, j]‖ stays.

    Of powers of two and whole numbers, so that nothing is rounded and both models are one.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    plain, packed = (tiny_model("llama", **sizes) for _ in range(2))
    generator, step = torch.Generator().manual_seed(0), 2.0**-4

    def drawn(least: int, beyond: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, beyond, shape, generator=generator).float()

    scales: dict[tuple[int, str], torch.Tensor] = {}
    layers = zip(plain.model.layers, packed.model.layers, strict=True)
    for layer, (one, other) in enumerate(layers):
        attended, read, inner = (2 ** drawn(0, 2, size) for size in (32, 32, 48))
        scales |= {(layer, "qkv_input"): attended, (layer, "input"): read}
        scales[layer, "intermediate"] = inner
        other.input_layernorm.weight.data /= attended
        other.post_attention_layernorm.weight.data /= read
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            weight = step * drawn(-4, 4, *one.get_submodule(name).weight.shape)
            one.get_submodule(name).weight.data = weight
            other.set_submodule(name, PackedByAwq(weight * attended, step))
        weight = step * drawn(-8, 8, *one.self_attn.o_proj.weight.shape)
        one.self_attn.o_proj.weight.data = weight
        other.self_attn.o_proj = PackedByAwq(weight, step)
        up, gate, down = (
            step * 2 * drawn(-2, 2, 48, 32),
            step * drawn(-4, 4, 48, 32),
            drawn(-4, 4, 32, 48),
        )
        for name, mine, its in (
            ("mlp.up_proj", up, up * read / inner[:, None]),
            ("mlp.gate_proj", gate, gate * read),
            ("mlp.down_proj", step * down, step * down * inner),
        ):
            one.get_submodule(name).weight.data = mine
            other.set_submodule(name, PackedByAwq(its, step))

    seen: dict[nn.Module, torch.Tensor] = {}
    found = [list(places(find_parts(model), "all_linear_inputs")) for model in (plain, packed)]
    for place in (*found[0], *found[1]):
        place.readers()[0].module.register_forward_pre_hook(
            lambda module, arguments: seen.update({module: arguments[0].flatten(0, 1)})
        )
    with torch.no_grad():
        torch.testing.assert_close(packed(token_ids()).logits, plain(token_ids()).logits)
    unweighted = 0
    for one, other in zip(*found, strict=True):
        # Where heads share keys and values AWQ leaves what reads them as it is.
        scale = scales.get((one.layer, one.tensor), torch.ones(one.width))
        given = [
            scales[one.layer, "intermediate"] if "up_proj" in reader.path else torch.ones(outputs)
            for reader in one.readers()
            for outputs in reader.module.weight.shape[:1]
        ]
        torch.testing.assert_close(other.weight, one.weight * scale / torch.cat(given)[:, None])
        mine, its = (seen[place.readers()[0].module] for place in (one, other))
        torch.testing.assert_close(its, mine / scale)
        if one.tensor == "input":
            continue  # W_u's rows count less where what it makes is scaled
        masks = [
            [create({"rule": rule}).bind(place, {}).mask(values, 0.5) for rule in ("wina", "topk")]
            for place, values in ((one, mine), (other, its))
        ]
        assert torch.equal(masks[0][0], masks[1][0])
        unweighted += int((masks[0][1] != masks[1][1]).sum())
    assert unweighted  # rules that see the input alone see another one


class Unpacked(nn.Linear):
    """Rounds inputs to whole numbers, without a derivative; unpacked when it runs, and keeps its scales."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.numbers = plain.weight.data
        self.weight = nn.Parameter(torch.zeros_like(plain.weight, dtype=torch.int8), False)
        self.weight_scale = nn.Parameter(torch.ones(plain.out_features, 1), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.weight.is_floating_point():
            self.weight = nn.Parameter(self.numbers, False)
        scale = x.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear((x / scale).round().to(torch.int8).float() * scale, self.weight)


@pytest.mark.parametrize("ran", [False, True])
def test_parameters_of_maps_that_round_inputs_and_unpack_themselves(ran: bool) -> None:
    """Norms before such maps are counted, and no map twice or with its scales."""
    plain, model = (tiny_model("llama", initializer_range=0.3) for _ in range(2))
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Unpacked(module))
    model.is_quantized = True
    if ran:
        model(torch.arange(3, 9)[None])
    assert count_parameters(model) == count_parameters(plain)


@pytest.mark.parametrize(("method", "unpacked"), [("compressed-tensors", True), ("gptq", False)])
def test_what_a_hook_unpacks_is_unpacked_before_a_stage_runs_past_it(
    method: str, unpacked: bool
) -> None:
    model = tiny_model("llama")
    up = model.model.layers[0].mlp.up_proj
    weight = up.weight
    del up.weight
    model.register_forward_pre_hook(lambda *_: setattr(up, "weight", weight))
    unpack(model, method)
    assert hasattr(up, "weight") == unpacked


class Saturated(Packed):
    """Rounds what it reads by a scale that was fixed for other values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-0.25, 0.25))


def test_weights_that_unit_vectors_do_not_tell_are_refused() -> None:
    torch.manual_seed(0)
    like = torch.empty(0)
    with pytest.raises(
        AtlasError, match=r"^up \(Saturated\): its weights cannot be read: .*dequantise"
    ):
        matrix(Projection("up", Saturated(nn.Linear(16, 8))), 16, like)


def test_what_overrides_a_linear_map_s_forward_is_no_plain_matrix() -> None:
    """Some libraries leave the class, and replace what an instance does."""
    plain = nn.Linear(4, 6)
    plain.forward = lambda x: x @ torch.ones(4, 6)  # type: ignore[method-assign]
    projection = Projection("up", plain)
    assert projection.weight() is None
    assert torch.equal(matrix(projection, 4, torch.empty(0)), torch.ones(6, 4))


def test_bytes_are_not_taken_for_a_matrix() -> None:
    """Quantised maps derive from Linear and keep what they packed under the same name."""
    packed, turned = nn.Linear(4, 6), nn.Linear(4, 6)
    packed.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.uint8), requires_grad=False)
    turned.weight = nn.Parameter(torch.zeros(12, 2), requires_grad=False)
    assert Projection("up", nn.Linear(4, 6)).weight() is not None
    assert [Projection("up", one).weight() for one in (packed, turned)] == [None, None]
