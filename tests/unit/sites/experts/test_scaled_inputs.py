"""Llama 4's experts, which go past the interface, against a plain float64 loop over their rows."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtures import EXPERTS, HIDDEN, tiny_mixture
from sparsity_atlas.criteria import create
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.lm.forest import Request
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.lm.sharing import abilities
from sparsity_atlas.sites.experts.experts_modules import experts_modules
from sparsity_atlas.sites.experts.implementation import installed
from sparsity_atlas.sites.experts.mixture import Experts
from sparsity_atlas.sites.experts.routing import recorded, repeated
from sparsity_atlas.sites.experts.scaled_inputs import ScaledInputs, meets_one
from sparsity_atlas.sites.find import Part, bind_parts, describe_parts, find_parts, observe_places
from sparsity_atlas.sparsify.attach import counted, sparsified
from sparsity_atlas.terms import TENSORS

IDS = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(1))
SITES = ("input", "up", "gate", "intermediate", "all_inputs")
WIDE = 48  # of an expert


def tiny(**changes: Any) -> Any:
    """Two layers of experts, of which a token meets one, beside a shared one."""
    return tiny_mixture("llama4_text", **{"num_experts_per_tok": 1} | changes)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def parts(model: Any) -> list[Part]:
    return find_parts(model)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=ids, use_cache=False).logits
    return made


def kept(row: Tensor, share: float) -> Tensor:
    """Top-p: the fewest entries that hold this share of Σ |v|."""
    order = row.abs().argsort(descending=True)
    before = row.abs()[order].cumsum(0) - row.abs()[order]
    mask = torch.zeros_like(row, dtype=torch.bool)
    return mask.index_fill_(0, order[before < share * row.abs().sum()], True)


class Loop:
    """A float64 copy whose routed experts are computed row by row.

    Attributes:
        zeros: of each layer, tensor, token and expert: dropped, or zero before.
    """

    def __init__(self, model: nn.Module, site: str, share: float) -> None:
        self.model: Any = copy.deepcopy(model).double()
        self.zeros: dict[tuple[int, str], dict[tuple[int, int], int]] = {}
        for layer, block in enumerate(self.model.model.layers):
            experts = block.feed_forward.experts
            experts.forward = self._forward(experts, layer, TENSORS[site], share)

    def _forward(self, own: Any, layer: int, tensors: tuple[str, ...], share: float) -> Any:
        def forward(rows: Tensor) -> Tensor:
            out = torch.zeros_like(rows)
            tokens = len(rows) // EXPERTS
            for number in rows.any(-1).nonzero()[:, 0].tolist():
                expert, token = divmod(number, tokens)

                def masked(
                    tensor: str, row: Tensor, onto: Tensor, at: Any = (token, expert)
                ) -> Tensor:
                    if tensor not in tensors:
                        return onto
                    mask = kept(row, share)
                    zeros = self.zeros.setdefault((layer, tensor), {})
                    zeros[at] = int((~mask | (row == 0)).sum())
                    return torch.where(mask, onto, 0)

                x = masked("input", rows[number], rows[number])
                g, u = (x @ own.gate_up_proj[expert]).chunk(2)
                g = own.act_fn(g)
                i = masked("gate", g, masked("up", u, u * g))
                out[number] = masked("intermediate", i, i) @ own.down_proj[expert]
            return out

        return forward


@pytest.mark.parametrize("site", SITES)
def test_is_what_a_loop_makes(model: Any, parts: list[Part], site: str) -> None:
    """Logits, and zeros by token and by expert, with the experts alone sparsified."""
    loop = Loop(model, site, 0.8)
    expected = logits(loop.model)
    experts = [part for part in parts if part.name == "experts"]
    valid = torch.ones_like(IDS, dtype=torch.bool)
    with sparsified(model, experts, site, create({"rule": "topp"}), 0.8) as counter:
        counter.expect(valid)
        found = logits(model)
        zeros, _ = counter.take()
        (by_expert,) = counter.by_expert.take()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits(model))
    for row, slot in enumerate(counter.slots):
        own = loop.zeros[slot.key.layer, slot.key.tensor]
        tokens, each = torch.zeros(IDS.numel()), torch.zeros(EXPERTS)
        reached = torch.zeros(EXPERTS)
        for (token, expert), count in own.items():
            tokens[token] += count
            each[expert] += count
            reached[expert] += 1
        assert torch.equal(zeros[row].flatten().float(), tokens)
        assert torch.equal(by_expert[row, 0].float(), each)
        assert torch.equal(by_expert[counter.by_expert.tokens_row(slot), 0].float(), reached)
        assert int(reached.sum()) == IDS.numel()


def test_parts(model: Any, parts: list[Part]) -> None:
    assert [(part.layer, part.name) for part in parts] == [
        (layer, name) for layer in (0, 1) for name in ("attention", "shared", "experts")
    ]
    described = json.loads(json.dumps(describe_parts(parts)))
    again = bind_parts(model, described)
    assert describe_parts(again) == described
    experts = again[-1]
    assert isinstance(experts, Experts)
    assert isinstance(experts.routed.module, ScaledInputs)
    assert (experts.size("input"), experts.outputs("input")) == (HIDDEN, 2 * WIDE)
    # Three of four experts rest: gate, up and down.
    assert experts.routed.resting == 3 * 3 * HIDDEN * WIDE


def test_dense_layers_between() -> None:
    layers = 4
    model = tiny(
        **{"num_hidden_layers": layers, "moe_layers": [1, 3], "no_rope_layers": [1] * layers},
        layer_types=["full_attention"] * layers,
    )
    found = [(part.layer, part.name) for part in find_parts(model) if part.name != "attention"]
    assert found == [
        *((0, "ffn"), (1, "shared"), (1, "experts")),
        *((2, "ffn"), (3, "shared"), (3, "experts")),
    ]


def test_nothing_dropped_changes_nothing(model: Any, parts: list[Part]) -> None:
    before = logits(model)
    with counted(model, parts):
        dense = logits(model)
    torch.testing.assert_close(dense, before, rtol=1e-5, atol=1e-6)
    for site in SITES:
        with sparsified(model, parts, site, create({"rule": "topp"}), 1.0):
            assert torch.equal(logits(model), dense)
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_generation_and_batch_size(model: Any, parts: list[Part]) -> None:
    def run(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with sparsified(model, parts, "intermediate", create({"rule": "topp"}), 0.9) as counter:
            counter.expect(torch.ones_like(ids, dtype=torch.bool), "prompt")
            with torch.no_grad():
                made = model.generate(
                    ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
                )
            return made, *counter.take()

    together = run(IDS)
    alone = [run(one[None]) for one in IDS]
    assert torch.equal(together[0], torch.cat([one[0] for one in alone]))
    assert torch.equal(together[1], torch.cat([one[1] for one in alone], 1))
    assert torch.equal(together[2], torch.cat([one[2] for one in alone], 2))


def test_by_itself_it_is_what_the_model_makes(model: Any, parts: list[Part]) -> None:
    experts = next(part for part in parts if isinstance(part, Experts))
    given: dict[str, Tensor] = {}
    made: list[Tensor] = []
    sources = [(experts, name) for name in experts.observable]
    with observe_places(model, sources, lambda v: given.update({v.tensor: v.in_order()})):
        logits(model)
    own = model.get_submodule(experts.routed.path)
    hook = own.register_forward_hook(lambda module, args, out: made.append(out))
    logits(model)
    hook.remove()
    with torch.no_grad():
        found = experts.run(given, "intermediate")
        torch.testing.assert_close(found, made[0].unflatten(0, (EXPERTS, -1)).sum(0))
        torch.testing.assert_close(experts.recompute(given, "up"), given["up"])
    assert given["weights"].unique().tolist() == [1.0]


def test_a_routing_can_be_made_again(model: Any) -> None:
    with recorded(model) as first:
        before = logits(model)
    every = torch.ones(IDS.numel(), dtype=torch.bool)
    with repeated(model, first, every), recorded(model) as again:
        assert torch.equal(logits(model), before)
    assert first.keys() == experts_modules(model).keys()
    assert all(torch.equal(first[path], again[path]) for path in first)
    other = {path: (index + 1) % EXPERTS for path, index in first.items()}
    with repeated(model, other, every), installed(model), recorded(model) as moved:
        assert not torch.allclose(logits(model), before)
    assert set(moved) == set(other)


def test_contexts_are_shared(model: Any) -> None:
    context = list(range(5, 25))
    able, faults = abilities(model, [Request([*context, 30 + n, 40 + n], 2, 0) for n in range(4)])
    assert (able, faults) == (Abilities(branches=True, selects=True), {})


def test_several_experts_a_token_are_refused() -> None:
    with pytest.raises(AtlasError, match="a token goes to 2 experts, each of which reads another"):
        find_parts(tiny(num_experts_per_tok=2))


def test_another_function_is_refused(model: Any) -> None:
    other = copy.deepcopy(model)
    experts = other.model.layers[1].feed_forward.experts
    own = experts.forward
    experts.forward = lambda hidden_states: own(hidden_states) + 0.1
    with pytest.raises(AtlasError, match=r"layers\.1\.feed_forward\.experts: its own forward pass"):
        find_parts(other)


def test_rows_that_are_no_blocks_are_refused(model: Any) -> None:
    experts = model.model.layers[0].feed_forward.experts
    with (
        meets_one(ScaledInputs(experts), "here"),
        pytest.raises(AtlasError, match="expected rows for each of its 4 experts"),
    ):
        experts(torch.zeros(5, HIDDEN))
