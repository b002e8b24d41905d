"""Which models may generate in rows that begin at different times, and that a mistake does not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtures import tiny_mixture
from small_configs import small_config
from sparsity_atlas.lm.continuous.called import Called
from sparsity_atlas.lm.continuous.ring import Ring
from sparsity_atlas.lm.continuous.ring_proof import proved
from sparsity_atlas.lm.forward import Masks
from sparsity_atlas.sites.find import random_ids
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 30
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}


def proof(name: str, dtype: torch.dtype = torch.float32, **settings: object) -> tuple[object, str]:
    # Weights so small as the default ones round every trace of a neighbour away.
    model = tiny_model(name, dtype, initializer_range=0.2, **settings)
    found = proved(model, random_ids(model, (1, 64))[0].tolist(), SIZE)
    assert found.length == SIZE
    return found.masks, found.fault


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "gpt2", "falcon", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_can(name: str, dtype: torch.dtype) -> None:
    assert proof(name, dtype) == (Masks.ONE, "")


@pytest.mark.parametrize(
    ("name", "settings", "short"),
    [
        ("mistral", {}, Masks.WINDOWED),
        ("gemma2", {}, Masks.BY_LAYER),
        ("gemma3", BOTH, Masks.BY_LAYER),
    ],
)
@pytest.mark.parametrize("window", [12, SIZE])
def test_a_window_of_attention(name: str, settings: dict, short: Masks, window: int) -> None:
    expected = short if window == 12 else Masks.ONE
    assert proof(name, sliding_window=window, **settings) == (expected, "")


@pytest.mark.parametrize("layers", [["chunked", "full"], ["chunked", "chunked"]])
@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_of_attention(chunk: int, layers: list[str]) -> None:
    types = [f"{one}_attention" for one in layers]
    model = tiny_mixture(
        "llama4_text", num_experts_per_tok=1, attention_chunk_size=chunk, layer_types=types
    )
    found = proved(model, random_ids(model, (1, 64))[0].tolist(), SIZE)
    expected = Masks.BY_LAYER if chunk == 7 else Masks.ONE
    assert (found.masks, found.fault) == (expected, "")


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "youtu"])
def test_values_that_are_narrower_than_keys(name: str) -> None:
    config = small_config(name)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = proved(model, random_ids(model, (1, 64))[0].tolist(), SIZE)
    assert (found.masks, found.fault) == (Masks.ONE, "")


def test_layers_that_keep_something_else_are_named_as_that() -> None:
    masks, fault = proof("lfm2")
    assert masks is None
    assert fault.startswith("its layers ask more of a cache than keys and values (IndexError: ")


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_models_whose_positions_are_in_the_mask_cannot(name: str) -> None:
    masks, fault = proof(name)
    assert masks is None
    assert fault


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_too_many_is_seen(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    mask = Called._mask
    monkeypatch.setattr(
        Called, "_mask", lambda self, age, lengths, window: mask(self, age, lengths + 6, window)
    )
    masks, fault = proof("llama", dtype)
    assert masks is None
    assert "relative error" in fault


def test_a_window_that_is_overlooked_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Called._mask
    monkeypatch.setattr(
        Called, "_mask", lambda self, age, lengths, window: mask(self, age, lengths, None)
    )
    assert proof("mistral", sliding_window=12)[0] is None


def test_a_prompt_in_the_wrong_places_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Ring.prompts

    def shifted(self: Ring, rows: Tensor, columns: Tensor, valid: Tensor) -> object:
        return prompts(self, rows, (columns + 1) % self.size, valid)

    monkeypatch.setattr(Ring, "prompts", shifted)
    assert proof("llama")[0] is None
