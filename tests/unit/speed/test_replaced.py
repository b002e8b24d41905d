"""Maps that leave weights out decode the tokens that a simulated criterion does; prompts stay dense."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.decoding.backend import Cpu
from sparsity_atlas.decoding.vector import Vector
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.find import find_parts, random_ids
from sparsity_atlas.sparsify.attach import applied
from sparsity_atlas.speed.decoder import Decoder
from sparsity_atlas.speed.replaced import replaced
from sparsity_atlas.terms import SITES
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
UNGATED = [site for site in SITES if site not in ("up", "gate")]
CASES = [
    *(("llama", site, "topp", 0.6) for site in SITES),
    *(("opt", site, "topp", 0.6) for site in UNGATED),  # biases, and rows without sequences
    ("phi3", "all_linear_inputs", "topk", 0.5),  # one module for two factors, one for three maps
    ("qwen2", "qkv_input", "maxp", 0.3),  # biases of some maps
    ("gpt_neox", "all_linear_inputs", "wina", 0.5),
    # FFNs with another nonlinearity, and with biases: their maps one by one; soft caps.
    ("gemma2", "all_linear_inputs", "topp", 0.6),
    ("llama-bias", "all_inputs", "threshold", 0.3),
    # Transposed matrices, and a class that adds its bias by itself.
    ("gpt2", "all_linear_inputs", "topp", 0.6),
    ("falcon", "all_linear_inputs", "topp", 0.6),
    # Norms of heads, norms behind what they are of, parallel branches, layer norms, multipliers, one
    # layer without a rotary embedding, FFNs without a gate.
    ("qwen3", "all_linear_inputs", "topp", 0.6),
    ("olmo2", "all_linear_inputs", "topk", 0.5),
    ("gemma3", "qkv_input", "topp", 0.6),
    ("cohere", "all_linear_inputs", "topk", 0.5),
    ("stablelm-parallel", "all_linear_inputs", "topp", 0.6),
    ("phi", "all_linear_inputs", "topp", 0.6),
    ("granite", "gate", "topp", 0.6),
    ("smollm3", "up", "topk", 0.5),
    ("nemotron", "all_inputs", "topp", 0.6),
]


def decoded(model: nn.Module, steps: int, around: Any) -> torch.Tensor:
    """Tokens that follow two prompts, all but the first of them within `around`."""
    decoder = Decoder(model, 2, 24)
    decoder.prompt(random_ids(model, (2, 7)))
    with around:
        return decoder.go_on(steps)


@pytest.mark.parametrize(("name", "site", "rule", "level"), CASES)
def test_tokens_are_those_of_the_simulated_criterion(
    name: str, site: str, rule: str, level: float
) -> None:
    model = tiny_model(name, initializer_range=0.3)
    parts = find_parts(model)
    bound = bind_all(create({"rule": rule}), parts, site)
    before = {path: module.forward for path, module in model.named_modules()}
    wanted = decoded(model, 12, applied(model, parts, site, bound, level))
    found = decoded(model, 12, replaced(model, parts, site, bound, level))
    assert torch.equal(found, wanted)
    assert not torch.equal(found, decoded(model, 12, torch.no_grad()))
    # All is as it was.
    assert {path: module.forward for path, module in model.named_modules()} == before


def test_rules_can_be_changed_behind_one_prompt() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parts, site = find_parts(model), "all_inputs"
    levels = 0.9, 0.4
    bound = bind_all(create({"rule": "topp"}), parts, site)
    wanted = [decoded(model, 12, applied(model, parts, site, bound, one)) for one in levels]
    assert not torch.equal(*wanted)
    with replaced(model, parts, site, bound, 1.0) as maps:
        for level, tokens in zip(levels, wanted, strict=True):
            maps.use(bound, level)
            assert torch.equal(decoded(model, 12, nullcontext()), tokens)


def test_products_know_what_is_likely_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each place by itself, and of places of which nobody says it, half."""
    model = tiny_model("llama", initializer_range=0.3)
    parts, site = find_parts(model), "all_linear_inputs"
    bound = bind_all(create({"rule": "topp"}), parts, site)
    expected = {place: (1 + index) / 64 for index, place in enumerate(bound) if index % 3}
    seen: list[float] = []
    own = Cpu.by_inputs

    def by_inputs(self: Cpu, vector: Vector, *others: Any) -> torch.Tensor:
        seen.append(vector.expected)
        return own(self, vector, *others)

    monkeypatch.setattr(Cpu, "by_inputs", by_inputs)
    with replaced(model, parts, site, bound, 0.6, expected):
        decoded(model, 2, nullcontext())
    assert set(seen) == {*expected.values(), 0.5}


def test_a_prompt_stays_dense() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parts = find_parts(model)
    bound = bind_all(create({"rule": "topp"}), parts, "all_linear_inputs")
    ids = random_ids(model, (2, 7))
    wanted = Decoder(model, 2, 24).prompt(ids)
    with replaced(model, parts, "all_linear_inputs", bound, 0.1) as maps:
        assert torch.equal(Decoder(model, 2, 24).prompt(ids), wanted)
        dense = sum(
            one.weight.numel() * 4
            for path, one in model.named_modules()
            if path.endswith("_proj") and isinstance(one, nn.Linear)
        )
        assert maps.copies == dense


def test_what_the_products_do_not_know_is_refused() -> None:
    model = tiny_model("llama", hidden_act="gelu")
    parts = find_parts(model)
    bound = bind_all(create({"rule": "topp"}), parts, "gate")
    with pytest.raises(AtlasError, match="none of plain maps with silu or relu"):
        decoded(model, 1, replaced(model, parts, "gate", bound, 0.5))
    model = tiny_model("llama")
    parts = find_parts(model)
    bound = bind_all(create({"rule": "random"}), parts, "gate")
    with pytest.raises(AtlasError, match="Random: its masks follow from no threshold"):
        decoded(model, 1, replaced(model, parts, "gate", bound, 0.5))
