"""Attention's maps: found by experiment in many architectures, refused where they are something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from model_parts import attentions_of, by_tensor, ffns_of, shown
from sparsity_atlas.activations.layout import Shape
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.place import Place, places
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.find import bind_parts, describe_parts, find_parts, observe, transform
from sparsity_atlas.sites.part import by_layer, sites_of
from sparsity_atlas.sparsify.attach import sparsified
from sparsity_atlas.sparsify.counted_vectors import slots_of
from sparsity_atlas.studies.output_error import layer_rows
from sparsity_atlas.terms import ATTENTION_SITES, LINEAR_INPUTS, SITES
from tiny_models import ARCHITECTURES, HIDDEN, LAYERS, VOCABULARY, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT = ({"q_proj", "k_proj", "v_proj"}, "o_proj")
# What the source of each architecture says; one that is not here has q_proj, k_proj, v_proj and o_proj.
ROLES: dict[str, tuple[set[str], str] | None] = {
    "phi3": ({"qkv_proj"}, "o_proj"),
    "phi3-half": ({"qkv_proj"}, "o_proj"),
    "gpt2": ({"c_attn"}, "c_proj"),
    "gpt_bigcode": ({"c_attn"}, "c_proj"),
    "openai-gpt": ({"c_attn"}, "c_proj"),
    "gptj": (SPLIT[0], "out_proj"),
    "lfm2": (SPLIT[0], "out_proj"),
    "opt": (SPLIT[0], "out_proj"),
    "opt-projected": (SPLIT[0], "out_proj"),
    "gpt_neox": ({"query_key_value"}, "dense"),
    "gpt_neox-serial": ({"query_key_value"}, "dense"),
    "falcon": ({"query_key_value"}, "dense"),
    "falcon-new": ({"query_key_value"}, "dense"),
    "falcon-serial": ({"query_key_value"}, "dense"),
    "bloom": ({"query_key_value"}, "dense"),
    "persimmon": ({"query_key_value"}, "dense"),
    "mpt": ({"Wqkv"}, "out_proj"),
    "phi": (SPLIT[0], "dense"),
    "bert-decoder": ({"query", "key", "value"}, "dense"),
    "ctrl": ({"Wq", "Wk", "Wv"}, "dense"),
    # Time mixing, which is no attention of this form.
    "rwkv": None,
}


# A convolution or a recurrence stands in the place of attention elsewhere.
SOME = {"lfm2": [1], "recurrent_gemma": [2]}


def leaf(path: str) -> str:
    return path.rpartition(".")[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_s_maps_are_found(name: str, dtype: torch.dtype) -> None:
    parts = find_parts(tiny_model(name, dtype))
    expected = ROLES.get(name, SPLIT)
    attentions = attentions_of(parts)
    if expected is None:
        assert not attentions
        assert not set(sites_of(parts)) & set(ATTENTION_SITES)
        return
    every = [one.layer for one in ffns_of(parts)]
    assert [one.layer for one in attentions] == SOME.get(name, every)
    assert set(ATTENTION_SITES) < set(sites_of(parts))
    for found in attentions:
        assert ({leaf(one.path) for one in found.qkv}, leaf(found.o.path)) == expected
        for tensor in ("qkv_input", "o_input"):
            made = sum(
                one(torch.zeros(1, found.size(tensor), dtype=dtype)).shape[-1]
                for one in found.readers(tensor)
            )
            assert made == found.outputs(tensor)
    assert len({found.o.path for found in attentions}) == len(attentions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# MPT's class fails with that setting.
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if ROLES.get(n, SPLIT) and n != "mpt"])
def test_maps_of_a_decoder_in_which_each_token_sees_all_others(
    name: str, dtype: torch.dtype
) -> None:
    """The same as of the causal one; eight sites where the FFN has a gate."""
    causal = find_parts(tiny_model(name, dtype))
    parts = find_parts(tiny_model(name, dtype, is_causal=False))
    assert sites_of(parts) == sites_of(causal)
    assert describe_parts(parts) == describe_parts(causal)


def test_eight_sites_of_masked_diffusion() -> None:
    for name in ("llama", "qwen2", "qwen3"):
        assert set(sites_of(find_parts(tiny_model(name, is_causal=False)))) == set(SITES)


def weights(module: nn.Module, entries: int) -> Tensor:
    """The module's weight as [outputs, entries], a view."""
    weight = module.weight
    return weight.data if isinstance(module, nn.Linear) else weight.data.T[:, :entries]


@pytest.mark.parametrize("site", ["qkv_input", "o_input", "all_linear_inputs"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "cohere"]
)
def test_dropping_an_entry_is_dropping_its_columns(name: str, site: str) -> None:
    """Entries that are dropped for every token leave the model as if nothing read them."""
    model = tiny_model(name, initializer_range=0.3)
    parts = find_parts(model)
    ids = token_ids()

    def mask_of(layer: int, tensor: str, values: Tensor) -> Tensor:
        mask = torch.ones_like(values, dtype=torch.bool)
        mask[..., layer::3] = False
        return mask

    with torch.no_grad():
        untouched = model(ids).logits
        with transform(parts, site, shown(mask_of)):
            masked = model(ids).logits
        assert torch.equal(model(ids).logits, untouched)
        for place in places(parts, site):
            for reader in place.readers():
                weights(reader.module, place.width)[:, place.layer :: 3] = 0
        by_hand = model(ids).logits
    torch.testing.assert_close(masked, by_hand, rtol=1e-5, atol=1e-5)
    assert (masked - untouched).abs().max() > 1e-3


def test_the_ffn_of_a_parallel_block_reads_its_own_copy() -> None:
    """In such a block attention and FFN read one tensor, and each site is its own readers'."""
    model = tiny_model("cohere")
    parts = find_parts(model)
    seen: dict[str, Tensor] = {}
    block = model.model.layers[0]
    for name, module in (("attention", block.self_attn.q_proj), ("ffn", block.mlp.up_proj)):
        module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    with (
        torch.no_grad(),
        transform(parts, "qkv_input", shown(lambda *a: torch.zeros_like(a[2]).bool())),
    ):
        model(token_ids())
    assert (seen["attention"] == 0).all()
    assert seen["ffn"].abs().min() > 0


def test_described_and_bound_again() -> None:
    model = tiny_model("gemma3")
    parts = find_parts(model)
    again = bind_parts(model, describe_parts(parts))
    assert [one.describe() for one in again] == [one.describe() for one in parts]
    before, after = attentions_of(parts), attentions_of(again)
    assert [one.qkv for one in after] == [one.qkv for one in before] != []


def test_a_model_without_them_says_so() -> None:
    parts = find_parts(tiny_model("rwkv"))
    with (
        pytest.raises(AtlasError, match="site 'o_input': layer 0 has none; its sites are input"),
        observe(parts, ["o_input"], shown(lambda *_: None)),
    ):
        pass


class Clipped(nn.Linear):
    """Looks like a linear map, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class Block(nn.Module):
    """An attention block of one head, and what makes it another thing."""

    def __init__(self, kind: str, causal: bool) -> None:
        super().__init__()
        self.kind = kind
        self.causal = causal
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        if kind in ("gate", "beside"):
            self.more = nn.Linear(HIDDEN, HIDDEN)
        if kind == "clipped":
            self.q = Clipped(HIDDEN, HIDDEN)
        if kind == "latent":
            self.v = nn.Sequential(nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN))
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.kind == "normalised":
            v = v / v.norm(dim=-1, keepdim=True)
        scores = q @ k.transpose(-1, -2) / HIDDEN**0.5
        if self.causal:
            ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, -torch.inf)
        if self.kind == "sink":
            ones = scores.new_zeros(*scores.shape[:-1], 1)
            mixed = torch.cat([scores, ones], -1).softmax(-1)[..., :-1] @ v
        elif self.kind == "none":
            mixed = v
        else:
            mixed = scores.softmax(-1) @ v
        if self.kind == "gate":
            mixed = mixed * self.more(x).sigmoid()
        out = self.o(mixed)
        return out + self.more(out) if self.kind == "beside" else out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x / x.norm(dim=-1, keepdim=True))
        return x + self.down(torch.relu(self.up(x / x.norm(dim=-1, keepdim=True))))


class Decoder(nn.Module):
    """A decoder of such blocks; `says` is what its configuration says of its masks."""

    def __init__(self, kind: str, causal: bool = True, says: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        says = causal if says is None else says
        self.config = SimpleNamespace(
            num_hidden_layers=LAYERS, vocab_size=VOCABULARY, is_causal=says
        )
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block(kind, causal) for _ in range(LAYERS))
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("causal", "says"), [(True, True), (False, False), (True, False)])
def test_a_plain_decoder_of_ours_has_them(causal: bool, says: bool) -> None:
    """Also one that is causal whatever its configuration says: a mean up to a token is one of all."""
    attentions = attentions_of(find_parts(Decoder("plain", causal, says)))
    assert [len(one.qkv) for one in attentions] == [3] * LAYERS


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "kind", ["gate", "beside", "latent", "normalised", "sink", "none", "clipped"]
)
def test_what_is_no_such_attention_is_not_taken_for_one(kind: str, causal: bool) -> None:
    """Another map, another reader, or values that are not simply averaged: FFN sites, and no others."""
    parts = find_parts(Decoder(kind, causal))
    assert not attentions_of(parts)
    assert sites_of(parts) == ("input", "intermediate", "all_inputs")


def test_one_that_says_to_be_causal_and_is_not() -> None:
    assert not attentions_of(find_parts(Decoder("plain", causal=False, says=True)))


def test_a_model_of_one_layer() -> None:
    """Its layer is all of the decoder; the embedding there is no map of attention's."""
    (found,) = attentions_of(find_parts(tiny_model("llama", num_hidden_layers=1)))
    assert found.o.path == "model.layers.0.self_attn.o_proj"


def test_one_odd_layer_is_enough() -> None:
    model = Decoder("plain")
    model.blocks[1].kind = "normalised"
    assert not attentions_of(find_parts(model))


def test_slots_know_the_weights_that_their_entries_meet() -> None:
    parts = find_parts(tiny_model("gemma3", head_dim=12, num_key_value_heads=1))
    found = {
        slot.key.tensor: (slot.width, slot.outputs) for slot in slots_of(parts, "all_linear_inputs")
    }
    heads, width = 2 * 12, ffns_of(parts)[0].width
    assert list(found) == list(LINEAR_INPUTS)
    assert found["qkv_input"] == (HIDDEN, heads + 2 * 12)
    assert found["o_input"] == (heads, HIDDEN)
    assert found["input"] == (HIDDEN, 2 * width)
    assert found["intermediate"] == (width, HIDDEN)


@pytest.mark.parametrize("rule", ["topk", "wina", "topp"])
def test_a_criterion_at_all_linear_inputs(rule: str) -> None:
    """Counts are those of the masks, tensor by tensor, in the order of a forward pass."""
    model = tiny_model("llama", initializer_range=0.3)
    parts = find_parts(model)
    criterion, ids = create({"rule": rule}), token_ids()
    bound = by_tensor(bind_all(criterion, parts, "all_linear_inputs"))
    by_hand: dict[tuple[int, str], Tensor] = {}

    def mask_of(layer: int, name: str, values: Tensor) -> Tensor:
        mask = bound[layer, name].mask(values.flatten(0, 1), 0.5).view_as(values)
        by_hand[layer, name] = (~mask | (values == 0)).sum(-1)
        return mask

    with torch.no_grad():
        with transform(parts, "all_linear_inputs", shown(mask_of)):
            expected = model(ids).logits
        with sparsified(model, parts, "all_linear_inputs", criterion, 0.5) as counter:
            counter.expect(torch.ones_like(ids, dtype=torch.bool))
            found = model(ids).logits
            zeros, _ = counter.take()
    torch.testing.assert_close(found, expected)
    assert len(counter.slots) == 4 * LAYERS
    for slot, counts in zip(counter.slots, zeros, strict=True):
        assert torch.equal(counts, by_hand[slot.key.layer, slot.key.tensor].long())


def test_wina_weighs_by_all_maps_that_read() -> None:
    attention = attentions_of(find_parts(tiny_model("llama")))[0]
    stacked = torch.cat([one.module.weight for one in attention.qkv])
    norms = Place(attention, "qkv_input").column_norms()
    torch.testing.assert_close(norms, stacked.detach().norm(dim=0))


def test_output_error_is_the_mean_of_the_parts(tmp_path: Path) -> None:
    """Of the maps that read a tensor, and of the FFN: by hand, from the captured tensors."""
    parts = find_parts(tiny_model("llama", initializer_range=0.3))
    ids = token_ids(batch=2, tokens=6)
    seen: dict[str, Tensor] = {}

    def keep(layer: int, name: str, values: Tensor) -> None:
        if layer == 0:
            seen[name] = values.flatten(0, 1).clone()

    store = ActivationStore(tmp_path / "activations.zarr", writable=True)
    with torch.no_grad(), observe(parts, ["all_linear_inputs"], shown(keep)):
        parts[0].model(ids)
    store.put_ids(ids.numpy())
    for name, values in seen.items():
        shapes = {0: Shape(1, values.shape[1])}
        store.create(name, shapes, len(values), len(values), "float32")
        store.put(name, 0, 0, values.numpy())
    layer = by_layer(parts)[0]
    bound = bind_all(create({"rule": "topk"}), layer, "all_linear_inputs")
    rules = {key.tensor: rule for key, rule in bound.items()}

    def kept(name: str, values: Tensor) -> Tensor:
        return torch.where(rules[name].mask(values, 0.5), values, 0)

    def error(dense: Tensor, sparse: Tensor) -> float:
        return float(((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())

    block = parts[0].model.model.layers[0]
    attention, ffn = block.self_attn, block.mlp
    with torch.no_grad():
        x, o = seen["qkv_input"], seen["o_input"]
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = error(*(torch.cat([one(v) for one in maps], -1) for v in (x, kept("qkv_input", x))))
        out = error(attention.o_proj(o), attention.o_proj(kept("o_input", o)))
        x = seen["input"]
        sparse = kept("input", x)
        i = kept("intermediate", ffn.act_fn(ffn.gate_proj(sparse)) * ffn.up_proj(sparse))
        whole = error(ffn(x), ffn.down_proj(i))
        expected = {
            "qkv_input": qkv,
            "o_input": out,
            "all_inputs": whole,
            "all_linear_inputs": (qkv + out + whole) / 3,
        }
        for site, value in expected.items():
            (row,) = layer_rows(layer, store, site, bound, ["0.5"])
            assert row["error"] == pytest.approx(value, rel=1e-5), site
        # A search may have chosen no level.
        assert layer_rows(layer, store, "all_linear_inputs", bound, []) == []
