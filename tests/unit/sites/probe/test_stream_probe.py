"""What has the form of an FFN and is none: it makes a gate, and nothing that is added to the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sites.probe.layers import module_lists
from tiny_models import HIDDEN, LAYERS, tiny_model

RANK = 7


class LowRank(nn.Module):
    """W_b silu(W_a x), and what becomes of it."""

    def __init__(self, inner: nn.Module, use: str) -> None:
        super().__init__()
        self.inner, self.use = inner, use
        self.a = nn.Linear(HIDDEN, RANK)
        self.b = nn.Linear(RANK, HIDDEN)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        x: Tensor = found if isinstance(found, Tensor) else found[0]
        made = self.b(nn.functional.silu(self.a(x)))
        changed = {
            "squashed": lambda: x * made.sigmoid(),
            "multiplied": lambda: x * (1 + made),
            "added": lambda: x + made,
        }[self.use]()
        return changed if isinstance(found, Tensor) else (changed, *found[1:])


def with_gates(use: str, *places: str, name: str = "llama") -> Any:
    """A model of which modules of each layer go through a low-rank gate."""
    model: Any = tiny_model(name)
    torch.manual_seed(1)
    for layer in model.model.layers:
        for place in places:
            setattr(layer, place, LowRank(getattr(layer, place), use).eval())
    return model


@pytest.mark.parametrize("use", ["squashed", "multiplied"])
@pytest.mark.parametrize(
    "places",
    [("input_layernorm",), ("post_attention_layernorm", "input_layernorm"), ("self_attn", "mlp")],
)
def test_gates_are_no_ffns(use: str, places: tuple[str, ...]) -> None:
    parts = find_parts(with_gates(use, *places))
    ffns = [part.paths[0] for part in parts if part.name == "ffn"]
    inner = ".inner" if "mlp" in places else ""
    assert ffns == [f"model.layers.{n}.mlp{inner}.down_proj" for n in range(LAYERS)]


def test_a_gate_in_a_layer_without_an_ffn_is_not_taken_for_one() -> None:
    model = with_gates("squashed", "input_layernorm")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    said = r"found 0 FFNs.* what model\.layers\.0\.input_layernorm\.b makes is not added to the layer's"
    with pytest.raises(AtlasError, match=said):
        find_parts(model)


def test_two_that_both_add_are_refused() -> None:
    """No rule says which of them is the layer's."""
    with pytest.raises(AtlasError, match=r"found 4 FFNs that a probe proves"):
        find_parts(with_gates("added", "self_attn"))


def test_what_a_shared_expert_is_weighted_with_is_no_matter() -> None:
    parts = find_parts(with_gates("multiplied", "input_layernorm", name="qwen2_moe"))
    assert [part.name for part in parts if part.name != "attention"] == [
        "shared",
        "experts",
    ] * LAYERS


def test_a_layer_ends_as_it_began() -> None:
    """Nothing that is put in stays."""
    model = with_gates("squashed", "input_layernorm")
    assert [path for path, _ in module_lists(model)] == ["model.layers"]
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        find_parts(model)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert not any(one._forward_hooks for one in model.modules())
