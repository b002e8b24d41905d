"""Models that see later tokens are refused, by what they compute and not by what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models.causality import check_causal
from sparsity_atlas.models.checkpoint import Checkpoint
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
    check_causal(tiny_model(name, dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", SEES_ALL)
def test_not_causal(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(AtlasError, match="not causal: another token at position 15 changes"):
        check_causal(made(kind, dtype, **SEES_ALL[kind]))


def test_a_decoder_of_the_bert_family() -> None:
    for kind in ("bert", "roberta", "electra"):
        check_causal(made(kind, torch.float32, **COMMON, is_decoder=True))
    with pytest.raises(AtlasError, match=r"is_decoder: true in its config.json"):
        check_causal(made("bert", torch.float32, **COMMON))


@pytest.mark.parametrize(
    "settings", [{"is_causal": False}, {"is_causal": False, "mask_token_id": 9}]
)
def test_what_is_said_of_masked_diffusion(settings: dict[str, Any]) -> None:
    with pytest.raises(AtlasError, match=r"masked-diffusion models are not supported yet$"):
        check_causal(made("llama", torch.float32, **GROUPED, **settings))


@pytest.mark.parametrize("positions", [2, 3, 7])
def test_few_positions(positions: int) -> None:
    """The probe fits into the model; learned positions end in an index error otherwise."""
    settings = {**COMMON, "max_position_embeddings": positions}
    check_causal(made("opt", torch.float32, **settings, ffn_dim=40, word_embed_proj_dim=16))
    with pytest.raises(AtlasError, match=f"position {positions - 1} "):
        check_causal(made("bert", torch.float32, **settings))


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
    check_causal(Peeking({}))
    with pytest.raises(AtlasError, match="not causal"):
        check_causal(Peeking(sees))


def test_rounding_is_no_proof() -> None:
    """Convolutions by Fourier transform round over the whole sequence."""
    check_causal(Peeking({0: 15}, strength=1e-8))
    with pytest.raises(AtlasError, match="not causal"):
        check_causal(Peeking({0: 15}, strength=1e-3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(AtlasError, match="its logits hold NaN or an infinity"):
        check_causal(model)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_that_is_no_number(causal: bool) -> None:
    """Sequences with it tell nothing; the others do."""
    model = made("llama", torch.float32, **GROUPED, is_causal=causal, tie_word_embeddings=False)
    ids = random_ids(model, (4, 16))
    alone = next(one for one in range(64) if (ids == one).any(1).sum() == 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[alone] = float("nan")
    if causal:
        check_causal(model)
    else:
        with pytest.raises(AtlasError, match="not causal"):
            check_causal(model)


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
        check_causal(Broken())


def test_stage_models_refuses_it(tmp_path: Path) -> None:
    made("bert", torch.float32, **{**COMMON, "vocab_size": 300}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(AtlasError, match="BertLMHeadModel: not causal"):
        describe(Checkpoint(tmp_path), None)
