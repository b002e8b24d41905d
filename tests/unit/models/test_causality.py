"""What kind a model is follows from what it computes, and not from what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.models.causality import kind_of
from sparsity_atlas.models.manifest import describe
from sparsity_atlas.sites.find import random_ids
from tiny_lm import tiny_tokenizer
from tiny_models import ARCHITECTURES, COMMON, GROUPED, HIDDEN, VOCABULARY, Mixer, tiny_model

TYPES = [torch.float32, torch.bfloat16]
XLM = {"vocab_size": 64, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
SEES_ALL: dict[str, dict[str, Any]] = {
    **{kind: COMMON for kind in ("bert", "roberta", "camembert", "xlm-roberta", "ernie")},
    **{kind: COMMON for kind in ("roformer", "rembert", "megatron-bert", "roberta-prelayernorm")},
    **{kind: COMMON for kind in ("bert-generation", "big_bird", "data2vec-text", "xlm-roberta-xl")},
    "electra": {**COMMON, "embedding_size": 16},
    "xlm": XLM,
    "llama": {**GROUPED, "is_causal": False},
    "qwen2": {**GROUPED, "is_causal": False},
    "gpt_neox": {**COMMON, "is_causal": False},
}


def made(kind: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_causal(name: str, dtype: torch.dtype) -> None:
    assert kind_of(tiny_model(name, dtype)) == "causal"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", SEES_ALL)
def test_not_causal(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(AtlasError, match="not causal: another token at position 15 changes"):
        kind_of(made(kind, dtype, **SEES_ALL[kind]))


def test_a_packed_model_that_rounds_by_its_batch() -> None:
    """As LLM.int8 does, which looks for large entries in all tokens at once."""
    model = made("llama", torch.float32, **GROUPED)
    model.is_quantized = True
    assert kind_of(model) == "causal"
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda module, arguments, output: output + output.std() / 10
        )
    with pytest.raises(AtlasError, match=r"not causal: .*runs packed.* with dequantise: true in"):
        kind_of(model)


def test_a_decoder_of_the_bert_family() -> None:
    for kind in ("bert", "roberta", "electra"):
        kind_of(made(kind, torch.float32, **COMMON, is_decoder=True))
    with pytest.raises(AtlasError, match=r"is_decoder: true in its config.json"):
        kind_of(made("bert", torch.float32, **COMMON))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox"])
def test_masked_diffusion(kind: str, dtype: torch.dtype) -> None:
    """By its configuration's mask, or by that of its entry."""
    settings = GROUPED | {"is_causal": False}
    assert kind_of(made(kind, dtype, **settings, mask_token_id=9)) == "diffusion"
    model = made(kind, dtype, **settings)
    assert kind_of(model, 9) == "diffusion"
    with pytest.raises(AtlasError, match=r"a mask token: say mask_token_id in the model's entry"):
        kind_of(model)


def test_a_mask_does_not_make_a_model_one() -> None:
    causal = tiny_model("llama", mask_token_id=9)
    assert kind_of(causal) == "causal"
    with pytest.raises(AtlasError, match="mask_token_id: 9 found, but it is causal"):
        kind_of(causal, 9)
    with pytest.raises(AtlasError, match=r"not causal.*is_causal: false"):
        kind_of(made("bert", torch.float32, **COMMON), 9)


def test_a_class_that_does_not_read_the_setting() -> None:
    """RWKV has no attention: with `is_causal: false`, too, it is causal."""
    assert kind_of(tiny_model("rwkv", is_causal=False)) == "causal"
    with pytest.raises(AtlasError, match="is_causal: false found, but it is causal"):
        kind_of(tiny_model("rwkv", is_causal=False, mask_token_id=9))


@pytest.mark.parametrize("mask", [-1, VOCABULARY, 10**6])
def test_a_mask_that_is_no_token(mask: int) -> None:
    model = made("llama", torch.float32, **GROUPED, is_causal=False)
    with pytest.raises(AtlasError, match=rf"from 0 to {VOCABULARY - 1}, found {mask}"):
        kind_of(model, mask)


class Half(nn.Module):
    """A decoder of which each token sees the next one, and no other behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Peeking({place: place + 1 for place in range(15)})
        self.config = AutoConfig.for_model("llama", **GROUPED, is_causal=False, mask_token_id=9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


def test_a_model_that_sees_some_later_tokens() -> None:
    with pytest.raises(AtlasError, match="the last token does not change the first one's"):
        kind_of(Half())


@pytest.mark.parametrize("positions", [2, 3, 7])
def test_few_positions(positions: int) -> None:
    """The probe fits into the model; learned positions end in an index error otherwise."""
    settings = {**COMMON, "max_position_embeddings": positions}
    kind_of(made("opt", torch.float32, **settings, ffn_dim=40, word_embed_proj_dim=16))
    with pytest.raises(AtlasError, match=f"position {positions - 1} "):
        kind_of(made("bert", torch.float32, **settings))


class Peeking(nn.Module):
    """A causal model in which the tokens at some places also see what comes after them."""

    def __init__(self, sees: dict[int, int], strength: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mix = nn.Embedding(VOCABULARY, HIDDEN), Mixer()
        self.fin = nn.Linear(HIDDEN, VOCABULARY)
        self.sees, self.strength = sees, strength

    def forward(self, ids: Tensor) -> Tensor:
        given = self.emb(ids)
        x = self.mix(given)
        for place, later in self.sees.items():
            x[:, place] += self.strength * given[:, later]
        return self.fin(x)


@pytest.mark.parametrize("sees", [{0: 15}, {0: 1}, {14: 15}, {7: 8}, {3: 15}])
def test_a_single_place_that_sees_ahead(sees: dict[int, int]) -> None:
    kind_of(Peeking({}))
    with pytest.raises(AtlasError, match="not causal"):
        kind_of(Peeking(sees))


def test_rounding_is_no_proof() -> None:
    """Convolutions by Fourier transform round over the whole sequence."""
    kind_of(Peeking({0: 15}, strength=1e-8))
    with pytest.raises(AtlasError, match="not causal"):
        kind_of(Peeking({0: 15}, strength=1e-3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(AtlasError, match="its logits hold NaN or an infinity"):
        kind_of(model)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_that_is_no_number(causal: bool) -> None:
    """Sequences with it tell nothing; the others do."""
    model = made("llama", torch.float32, **GROUPED, is_causal=causal, tie_word_embeddings=False)
    ids = random_ids(model, (4, 16))
    alone = next(one for one in range(64) if (ids == one).any(1).sum() == 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[alone] = float("nan")
    if causal:
        kind_of(model)
    else:
        with pytest.raises(AtlasError, match="not causal"):
            kind_of(model)


class Broken(nn.Module):
    """A model whose code is of another release."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        return self.emb(ids).nosuch


def test_a_forward_pass_that_fails() -> None:
    with pytest.raises(
        AtlasError, match=r"Broken: its forward pass fails: AttributeError: .*nosuch"
    ):
        kind_of(Broken())


def test_stage_models_refuses_it(tmp_path: Path) -> None:
    made("bert", torch.float32, **{**COMMON, "vocab_size": 300}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(AtlasError, match="BertLMHeadModel: not causal"):
        describe(Checkpoint(tmp_path), None)
