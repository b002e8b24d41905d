"""Rules that differ from expert to expert, against a plain float64 loop over tokens and experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expert_loops import Loop, Weights, largest, share
from mixtures import EACH, EXPERTS, HIDDEN, Alone, tiny_mixture
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.expert_rules import ExpertRules
from sparsity_atlas.criteria.place import Place
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.experts.mixture import Experts
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sites.hooks import observe
from sparsity_atlas.sparsify.attach import sparsified
from sparsity_atlas.sparsify.counted_vectors import slots_of

IDS = torch.randint(3, 90, (16, 6), generator=torch.Generator().manual_seed(1))
# Gated, with a shared expert beside; transposed, interleaved and biased; without a gate.
KINDS = ("qwen2_moe", "gpt_oss", "ungated")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param != "ungated":
        return tiny_mixture(request.param)
    made: Any = tiny_mixture("olmoe")
    for layer in made.model.layers:
        ungated: Any = Alone("nemotron_h", "NemotronHExperts").experts
        ungated.config = layer.mlp.experts.config
        layer.mlp.experts = ungated
    return made


@pytest.fixture(scope="module")
def experts(model: nn.Module) -> list[Experts]:
    return [part for part in find_parts(model) if isinstance(part, Experts)]


def attached(
    model: Any, experts: list[Experts], site: str, criterion: Any, level: float, ids: Tensor = IDS
) -> tuple[Tensor, Tensor]:
    """Logits, and zeros [slots, batch, tokens]."""
    with torch.no_grad(), sparsified(model, experts, site, criterion, level) as counter:
        counter.expect(torch.ones_like(ids, dtype=torch.bool))
        made = model(input_ids=ids, use_cache=False).logits
        return made, counter.take()[0]


# The weights


def test_an_expert_s_weights_are_those_taken_out_by_hand(experts: list[Experts]) -> None:
    for part in experts:
        for number, expert in enumerate(part.experts):
            by_hand = Weights(part.routed.module, number)
            for tensor in part.tensors:
                place = Place(expert, tensor)
                weight = by_hand.read_by(tensor)
                assert torch.equal(place.weight.double(), weight)
                torch.testing.assert_close(place.column_norms(), weight.norm(dim=0).float())
                assert place.width == weight.shape[1] == expert.size(tensor)
                assert sum(len(one.weight()) for one in place.readers()) == expert.outputs(tensor)


def test_what_an_expert_s_maps_make_has_their_biases(experts: list[Experts]) -> None:
    part = experts[0]
    module: Any = part.routed.module
    x = torch.randn(3, HIDDEN)
    for number, expert in enumerate(part.experts):
        made = Place(expert, "input").outputs(x)
        if not module.has_bias:
            wanted = x @ Place(expert, "input").weight.T
        else:  # in turn, the gate first
            z = x @ module.gate_up_proj[number] + module.gate_up_proj_bias[number]
            wanted = torch.cat([z[:, 1::2], z[:, ::2]], -1)
        torch.testing.assert_close(made, wanted)


def test_the_weights_of_all_experts_together_are_asked_for_in_vain(experts: list[Experts]) -> None:
    place = Place(experts[0], "intermediate")
    with pytest.raises(AtlasError, match="each expert has weights of its own"):
        place.column_norms()
    with pytest.raises(AtlasError, match="each expert has weights of its own"):
        place.outputs(torch.zeros(1, place.width))


# Weighted rules

CASES: list[tuple[str, str, Any, float]] = [
    *(("wina", site, largest, 0.3) for site in ("input", "intermediate", "all_inputs")),
    *(("weighted_topk", site, largest, 0.75) for site in ("up", "gate", "intermediate")),
    *(("weighted_topp", site, share, 0.6) for site in ("up", "gate", "intermediate")),
]


@pytest.mark.parametrize(("rule", "site", "keep", "level"), CASES)
def test_weighted_rules(
    model: nn.Module, experts: list[Experts], rule: str, site: str, keep: Any, level: float
) -> None:
    if site not in ("input", "intermediate", "all_inputs") and experts[0].routed.gating is None:
        return  # without a gate there are no such sites
    ids = IDS[:2]
    loop = Loop(model, [part.paths[0] for part in experts], site, keep(level))
    wanted = loop(ids)
    found, zeros = attached(model, experts, site, create({"rule": rule}), level, ids)
    slots = slots_of(experts, site, create({"rule": rule}))
    for slot, counted in zip(slots, zeros, strict=True):
        number = [part.layer for part in experts].index(slot.key.layer)
        assert counted.flatten().tolist() == loop.zeros[number, slot.key.tensor]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "site"),
    [("wina", "all_inputs"), ("weighted_topk", "intermediate"), ("weighted_topp", "gate")],
)
def test_batch_size_changes_no_count(
    model: nn.Module, experts: list[Experts], rule: str, site: str
) -> None:
    if site == "gate" and experts[0].routed.gating is None:
        return
    criterion = create({"rule": rule})
    made, zeros = attached(model, experts, site, criterion, 0.5)
    for size in (1, 4):
        found = [attached(model, experts, site, criterion, 0.5, ids) for ids in IDS.split(size)]
        assert torch.equal(torch.cat([one for _, one in found], 1), zeros)
        torch.testing.assert_close(torch.cat([one for one, _ in found]), made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["input", "intermediate", "all_inputs"])
def test_nothing_dropped_changes_no_bit(model: Any, experts: list[Experts], site: str) -> None:
    with torch.no_grad(), observe(experts, "input", lambda vectors: None):
        dense = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(attached(model, experts, site, create({"rule": "wina"}), 1.0)[0], dense)


def test_slots_of_the_input(experts: list[Experts]) -> None:
    """Taken apart a token has K rows, each of which meets the weights of one expert."""
    part = experts[0]
    whole, apart = (
        slots_of([part], "input", create({"rule": rule}))[0] for rule in ("topk", "wina")
    )
    assert whole.width == HIDDEN
    assert apart.width == EACH * HIDDEN
    assert whole.width * whole.outputs == apart.width * apart.outputs
    assert [slot.key for slot in slots_of(experts, "all_inputs", create({"rule": "wina"}))] == [
        slot.key for slot in slots_of(experts, "all_inputs")
    ]


def test_everything_dropped_at_the_input_is_counted_once(
    model: nn.Module, experts: list[Experts]
) -> None:
    _, zeros = attached(model, experts, "input", create({"rule": "wina"}), 0.0)
    assert zeros.unique().tolist() == [EACH * HIDDEN]


def test_a_rule_for_each_expert(experts: list[Experts]) -> None:
    bound = bind_all(create({"rule": "wina"}), experts, "input")
    for rule in bound.values():
        assert isinstance(rule, ExpertRules)
        assert len(rule.rules) == EXPERTS
    for name in ("topp", "random", "nm", "threshold"):
        bound = bind_all(create({"rule": name}), experts, "intermediate")
        assert not any(isinstance(rule, ExpertRules) for rule in bound.values())


# The user's own

OWN = '''
import copy
import torch
from sparsity_atlas.criteria import Criterion


class Own(Criterion):
    """Keep |v_j| · ‖W[:, j]‖ ≥ level · its mean over the row."""

    dense_level = 0.0
    highest = 100.0
    coarse_levels = ("0.5",)

    def bind(self, place, state):
        bound = copy.copy(self)
        bound.norms = place.column_norms()
        return bound

    def mask(self, values, level):
        scores = values.abs().float() * self.norms
        return scores >= level * scores.mean(-1, keepdim=True)
'''


def above_mean(row: Tensor, own: Weights, layer: int, tensor: str) -> Tensor:
    scores = row.abs() * own.read_by(tensor).norm(dim=0)
    return scores >= 0.6 * scores.mean()


@pytest.mark.parametrize("site", ["input", "intermediate", "all_inputs"])
def test_a_rule_in_a_file(
    model: nn.Module, experts: list[Experts], site: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    criterion = create({"file": str(tmp_path / "own.py")})
    loop = Loop(model, [part.paths[0] for part in experts], site, above_mean)
    wanted = loop(IDS[:2])
    found, zeros = attached(model, experts, site, criterion, 0.6, IDS[:2])
    assert criterion.tried
    slots = slots_of(experts, site, criterion)
    for slot, counted in zip(slots, zeros, strict=True):
        number = [part.layer for part in experts].index(slot.key.layer)
        assert counted.flatten().tolist() == loop.zeros[number, slot.key.tensor]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_rule_in_a_file_that_looks_at_weights_and_denies_it(
    experts: list[Experts], tmp_path: Path
) -> None:
    text = OWN.replace("    highest", "    looks_at_weights = False\n    highest")
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(AtlasError, match="says so by looks_at_weights = True"):
        bind_all(create({"file": str(tmp_path / "own.py")}), experts, "input")


def test_dense_parts_are_bound_as_ever(model: nn.Module) -> None:
    """What stands beside routed experts has one rule a place, and is no other part to any rule."""
    beside = [part for part in find_parts(model) if not isinstance(part, Experts)]
    assert all(part.apart() is part and part.experts == () for part in beside)
    if any(part.name == "shared" for part in beside):
        shared = [part for part in beside if part.name == "shared"]
        bound = bind_all(create({"rule": "wina"}), shared, "input")
        assert not any(isinstance(rule, ExpertRules) for rule in bound.values())
