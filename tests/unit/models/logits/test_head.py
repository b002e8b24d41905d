"""Logits in pieces are the class's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsity_atlas.models.logits import head
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

# What a class does behind its head, so strong that nobody could miss it.
BEHIND = {
    "gemma2": {"final_logit_softcapping": 0.02},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 3.0},
}


def calling(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: model(ids, **head.without_cache(model)).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pieces_are_the_classes_own_logits(name: str) -> None:
    model, ids = tiny_model(name, **BEHIND.get(name, {})), token_ids(3, 7)
    shapes: list[Any] = []
    with torch.no_grad():
        whole = calling(model, ids)().flatten(0, 1)
        handle = model.get_output_embeddings().register_forward_hook(
            lambda module, arguments, output: shapes.append(tuple(output.shape))
        )
        where = torch.tensor([0, 2, 3, 7, 8, 9, 13, 19, 20])
        found = list(head.pieces(model, calling(model, ids), where, rows=4))
        handle.remove()
    assert [len(one) for one in found] == [3, 3, 3]
    assert shapes == [(1, 3, VOCABULARY)] * 3
    torch.testing.assert_close(torch.cat(found), whole[where], rtol=1e-5, atol=1e-6)
    assert head.fault(model) is None
    assert "forward" not in model.base_model.__dict__
    if name in BEHIND:
        hidden: list[Tensor] = []
        handle = model.get_output_embeddings().register_forward_hook(
            lambda module, arguments, output: hidden.append(output)
        )
        calling(model, ids)()
        assert head.relative_error(hidden[0].flatten(0, 1), whole) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(dtype: torch.dtype) -> None:
    model = tiny_model("gemma2", dtype, initializer_range=0.3, final_logit_softcapping=2.0)
    assert head.fault(model) is None


def test_a_piece_is_made_when_it_is_asked_for() -> None:
    model, ids = tiny_model("llama"), token_ids(2, 6)
    made, passes = [], []
    model.lm_head.register_forward_hook(lambda *_: made.append(1))
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        found = head.pieces(model, calling(model, ids), torch.arange(12), rows=3)
    for number, one in enumerate(found):
        assert len(made) == number + 1
        assert one.shape == (3, VOCABULARY)
    assert passes == [1]


def test_a_head_that_forgets_what_stands_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose logits depend on more than the head's own tokens."""
    model = tiny_model("llama")
    original = model.forward

    def centred(*arguments: Any, **options: Any) -> Any:
        output = original(*arguments, **options)
        output.logits = output.logits - output.logits.mean(1, keepdim=True)
        return output

    monkeypatch.setattr(model, "forward", centred)
    assert "relative error" in (head.fault(model) or "")


def test_a_model_without_a_decoder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "base_model_prefix", "nothing")
    monkeypatch.setattr(model, "get_decoder", lambda: model)
    # As Llama 4's does: what it holds with an embedding is tried.
    assert head.fault(model) is None
    model.model.get_input_embeddings = None
    assert head.fault(model) == "AttributeError: LlamaForCausalLM names no decoder of its own"


def test_the_budget_of_a_piece() -> None:
    assert head.rows_of_a_piece(262_144, "cpu") * 262_144 * 4 == 128 * 2**20
    assert head.rows_of_a_piece(2**40, "cuda") == 1


def test_a_generating_head_sees_one_token() -> None:
    model, ids = tiny_model("gemma2", final_logit_softcapping=0.02), token_ids(3, 7)
    with torch.no_grad():
        whole = calling(model, ids)()
        with head.shown_the_last(model):
            last = calling(model, ids)()
    assert last.shape == (3, 1, VOCABULARY)
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-5, atol=1e-6)


def test_a_head_that_must_see_every_token_does() -> None:
    model, ids = tiny_model("llama"), token_ids(3, 7)
    model.base_model_prefix = "nothing"
    model.get_decoder = lambda: model
    model.model.get_input_embeddings = None
    with torch.no_grad(), head.shown_the_last(model):
        assert calling(model, ids)().shape == (3, 7, VOCABULARY)
        cut = list(head.logits(model, calling(model, ids), torch.arange(4, 9), select=False))
        torch.testing.assert_close(torch.cat(cut), calling(model, ids)().flatten(0, 1)[4:9])
