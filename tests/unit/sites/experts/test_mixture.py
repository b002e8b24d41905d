"""A mixture's layers as parts: found, observed, rewritten, counted, refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtures import EACH, EXPERTS, HIDDEN, WIDTH, tiny_mixture
from sparsity_atlas.criteria import create
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.experts.mixture import Experts, RoutedVectors
from sparsity_atlas.sites.find import (
    Part,
    Vectors,
    find_parts,
    intercept,
    observe,
    observe_places,
    transform,
)
from sparsity_atlas.sites.part import measure
from sparsity_atlas.sparsify.attach import counted, sparsified
from sparsity_atlas.sparsify.counted_vectors import slots_of

IDS = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(1))
FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "gemma4_text")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_mixture(request.param)


@pytest.fixture(scope="module")
def parts(model: nn.Module) -> list[Part]:
    return find_parts(model)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def names(family: str) -> list[tuple[int, str]]:
    return [(part.layer, part.name) for part in find_parts(tiny_mixture(family))]


def test_parts_of_a_layer() -> None:
    assert names("olmoe") == [
        *((0, "attention"), (0, "experts")),
        *((1, "attention"), (1, "experts")),
    ]
    assert names("qwen2_moe")[:3] == [(0, "attention"), (0, "shared"), (0, "experts")]
    assert names("deepseek_v3") == [(0, "ffn"), (1, "shared"), (1, "experts")]
    assert names("gemma4_text")[:2] == [(0, "shared"), (0, "experts")]


def test_an_ffn_of_a_router_is_no_shared_expert() -> None:
    assert names("zaya") == [(0, "experts"), (1, "experts")]


def test_naming_modules_of_a_mixture_is_refused() -> None:
    with pytest.raises(AtlasError, match="modules: names the FFN of every layer"):
        find_parts(
            tiny_mixture("olmoe"),
            {
                "up": "model.layers.{layer}.mlp.gate",
                "down": "model.layers.{layer}.mlp.gate",
                "activation": "silu",
            },
        )


def test_every_tensor_is_shown_once(model: nn.Module, parts: list[Part]) -> None:
    seen: list[tuple[int, str, str]] = []

    def note(vectors: Vectors) -> None:
        seen.append(vectors.key)
        rows = vectors.values.shape[:-1]
        if isinstance(vectors, RoutedVectors) and vectors.tensor != "input":
            assert rows == (IDS.numel() * EACH,)
            assert vectors.experts.shape == rows
            assert vectors.values.shape[-1] == vectors.part.size(vectors.tensor) / EACH
        else:
            assert rows == IDS.shape
        counts = torch.ones(rows, dtype=torch.int32)
        of_tokens = vectors.of_tokens(counts)
        assert of_tokens.shape == IDS.shape
        assert of_tokens.unique().tolist() == [1 if rows == IDS.shape else EACH]

    before = logits(model)
    with observe(parts, ("input", "up", "gate", "intermediate"), note):
        assert torch.equal(logits(model), before)
    beside = [part for part in parts if part.name != "attention"]
    assert sorted(seen) == sorted(
        (part.layer, part.name, name) for part in beside for name in part.tensors
    )


def test_nothing_dropped_changes_no_bit(model: nn.Module, parts: list[Part]) -> None:
    before = logits(model)
    for site in ("input", "up", "gate", "intermediate", "all_inputs"):
        with sparsified(model, parts, site, create({"rule": "topp"}), 1.0) as counter:
            counter.expect(torch.ones_like(IDS, dtype=torch.bool))
            assert torch.equal(logits(model), before)
            counter.take()


def test_everything_dropped_at_intermediate_leaves_out_what_parts_make() -> None:
    """Of experts and shared experts without biases: as if they made zeros."""
    model = tiny_mixture("qwen2_moe")
    parts = find_parts(model)
    with transform(parts, "intermediate", lambda vectors: torch.zeros_like(vectors.values).bool()):
        found = logits(model)
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        layer.mlp.register_forward_hook(lambda module, args, out: out * 0)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-6)


def test_experts_alone_can_be_left_out() -> None:
    model = tiny_mixture("qwen2_moe")
    experts = [part for part in find_parts(model) if part.name == "experts"]
    with intercept(experts, "intermediate", lambda vectors, write: torch.zeros_like(write)):
        found = logits(model)
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        layer.mlp.experts.register_forward_hook(lambda module, args, out: out * 0)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("site", ["input", "up", "gate", "intermediate", "all_inputs"])
def test_batch_size_changes_no_count(model: nn.Module, parts: list[Part], site: str) -> None:
    def zeros(ids: Tensor) -> tuple[Tensor, Tensor]:
        with sparsified(model, parts, site, create({"rule": "topp"}), 0.9) as counter:
            counter.expect(torch.ones_like(ids, dtype=torch.bool))
            made = logits(model, ids)
            return counter.take()[0], made

    together, made = zeros(IDS)
    alone = [zeros(one[None]) for one in IDS]
    assert torch.equal(together, torch.cat([one for one, _ in alone], 1))
    torch.testing.assert_close(made, torch.cat([one for _, one in alone]), rtol=1e-4, atol=1e-5)
    assert together.any()


def test_counts_are_of_all_entries(model: nn.Module, parts: list[Part]) -> None:
    """Everything dropped: as many zeros as a slot has entries, for each token."""
    slots = slots_of(parts, "intermediate")
    with sparsified(model, parts, "intermediate", create({"rule": "topk"}), 0.0) as counter:
        valid = torch.ones_like(IDS, dtype=torch.bool)
        valid[0, :3] = False
        counter.expect(valid)
        logits(model)
        zeros, _ = counter.take()
    for slot, counted_zeros in zip(slots, zeros, strict=True):
        assert torch.equal(counted_zeros, slot.width * valid.long())
    assert {slot.width for slot in slots if slot.key.part == "experts"} <= {
        EACH * WIDTH,
        EACH * 48,
    }


def test_generation_is_counted(model: Any, parts: list[Part]) -> None:
    with torch.no_grad(), counted(model, parts) as counter:
        counter.expect(torch.ones(2, 5, dtype=torch.bool), "prompt")
        model.generate(
            IDS[:2, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
        prompt, later = counter.take()
    assert prompt.shape[1:] == (2, 5)
    assert later.shape == (2, prompt.shape[0], 2)


def test_experts_called_by_themselves_are_refused(model: nn.Module, parts: list[Part]) -> None:
    experts = next(part for part in parts if isinstance(part, Experts))
    index = torch.zeros(3, EACH, dtype=torch.long)
    with (
        observe([experts], "intermediate", lambda vectors: None),
        pytest.raises(AtlasError, match="ran outside a forward pass"),
    ):
        experts.routed.module(torch.zeros(3, HIDDEN), index, torch.ones(3, EACH))


def test_rules_that_look_at_sequences_are_refused(model: nn.Module, parts: list[Part]) -> None:
    with (
        pytest.raises(AtlasError, match="looks at whole sequences"),
        sparsified(model, parts, "intermediate", create({"rule": "prompt_mask"}), 0.5),
    ):
        pass


@pytest.mark.parametrize("site", ["input", "up", "gate", "intermediate", "all_inputs"])
def test_an_output_by_itself_is_what_the_model_makes(
    model: Any, parts: list[Part], site: str
) -> None:
    """From the input and the routing, untouched and with a site changed, whatever else is attached."""
    experts = next(part for part in parts if isinstance(part, Experts))
    given: dict[str, Tensor] = {}
    made: list[Tensor] = []

    def keep(vectors: Vectors) -> None:
        given[vectors.tensor] = vectors.in_order()

    def halved(vectors: Vectors, write: Tensor) -> Tensor:
        return torch.where(vectors.values > 0, write, 0)

    with observe_places(model, [(experts, name) for name in experts.sources(site)], keep):
        logits(model)
    hook = experts.routed.module.register_forward_hook(lambda module, args, out: made.append(out))
    logits(model)
    with intercept([experts], site, halved):
        logits(model)
    hook.remove()
    assert [tuple(given[name].shape) for name in ("input", "index", "weights")] == [
        (IDS.numel(), HIDDEN),
        *[(IDS.numel(), EACH)] * 2,
    ]
    with torch.no_grad(), transform([experts], site, lambda v: torch.zeros_like(v.values).bool()):
        dense, changed = experts.run(given, site), experts.run(given, site, halved)
        left = experts.run(given, site, lambda *_: None)
    torch.testing.assert_close(dense, made[0].view_as(dense), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(changed, made[1].view_as(dense), rtol=1e-5, atol=1e-6)
    assert torch.equal(left, dense)
    assert not torch.allclose(dense, changed)


def test_tensors_by_themselves_are_those_of_a_pass(model: nn.Module, parts: list[Part]) -> None:
    experts = next(part for part in parts if isinstance(part, Experts))
    seen: dict[str, Tensor] = {}
    places = [(experts, name) for name in experts.observable]
    with observe_places(
        model, places, lambda vectors: seen.update({vectors.tensor: vectors.in_order()})
    ):
        logits(model)
    for name in experts.tensors:
        rows = 1 if name == "input" else EACH
        with torch.no_grad():
            found = experts.recompute(seen, name)
        assert found.shape == (rows * IDS.numel(), experts.size(name) // rows)
        torch.testing.assert_close(found, seen[name], rtol=1e-5, atol=1e-6)


def test_sizes(parts: list[Part]) -> None:
    experts = next(part for part in parts if isinstance(part, Experts))
    assert experts.routed.count == EXPERTS
    assert measure(parts)["layers"] == len({part.layer for part in parts})
    assert experts.size("intermediate") == EACH * experts.routed.width
    assert experts.outputs("input") == 2 * EACH * experts.routed.width
