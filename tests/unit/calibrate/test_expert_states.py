"""Calibrated rules inside experts, by layer and by expert, against a plain float64 loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expert_loops import Loop, Weights
from mixtures import EACH, EXPERTS, HIDDEN, tiny_mixture
from sparsity_atlas.calibrate.expert_states import served_by_layer, states_of
from sparsity_atlas.criteria import create, declared, rule_names
from sparsity_atlas.criteria.binding import bind_all, check_places
from sparsity_atlas.criteria.error_table import ErrorTable
from sparsity_atlas.criteria.expert_rules import ExpertRules
from sparsity_atlas.criteria.in_experts import why_not
from sparsity_atlas.criteria.level_table import at_level
from sparsity_atlas.criteria.place import State, places, state_name
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.experts.grouping import group
from sparsity_atlas.sites.experts.mixture import Experts, RoutedVectors
from sparsity_atlas.sites.find import Part, Vectors, find_parts, observe
from sparsity_atlas.sparsify.attach import dropping, sparsified
from sparsity_atlas.sparsify.counted_vectors import slots_of
from sparsity_atlas.terms import SITES, TENSORS

SEEN = torch.randint(3, 90, (6, 8), generator=torch.Generator().manual_seed(5))
IDS = torch.randint(3, 90, (16, 6), generator=torch.Generator().manual_seed(1))
FFN_TENSORS = ("input", "up", "gate", "intermediate")
# So that some of the four experts have fewer.
LEAST = 24


class Seen:
    """What a model's experts had of some tokens, as a store would have it."""

    def __init__(self, model: Any, parts: list[Part]) -> None:
        self.values: dict[tuple[int, str], Tensor] = {}
        self.index: dict[int, Tensor] = {}
        with torch.no_grad(), observe(parts, FFN_TENSORS, self._keep):
            model(input_ids=SEEN, use_cache=False)

    def _keep(self, vectors: Vectors) -> None:
        values = vectors.values
        if isinstance(vectors, RoutedVectors):
            self.index[vectors.part.layer] = vectors.grouping.index
            if vectors.tensor != "input":
                values = vectors.grouping.ungrouped(values)
            self.values[vectors.part.layer, vectors.tensor] = values.flatten(0, 1)

    def sample(self, layer: int) -> Any:
        class Sample:
            def read(_, tensor: str) -> Tensor:
                return self.values[layer, tensor]

        return Sample()

    def rows(self, layer: int, tensor: str, expert: int | None) -> Tensor:
        """Those of one expert, or of all."""
        values = self.values[layer, tensor]
        if expert is None:
            return values
        own = (self.index[layer] == expert).nonzero()
        return values[own[:, 0]] if tensor == "input" else values[own[:, 0] * EACH + own[:, 1]]


@pytest.fixture(scope="module", params=["qwen2_moe", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_mixture(request.param)


@pytest.fixture(scope="module")
def experts(model: nn.Module) -> list[Any]:
    return [part for part in find_parts(model) if isinstance(part, Experts)]


@pytest.fixture(scope="module")
def seen(model: nn.Module, experts: list[Any]) -> Seen:
    return Seen(model, find_parts(model))


def calibrated(criterion: Any, experts: list[Any], site: str, seen: Seen) -> dict[str, State]:
    states: dict[str, State] = {}
    for place in places(experts, site):
        sample, index = seen.sample(place.layer), seen.index[place.layer]
        states |= states_of(criterion, place, sample, index)
    return states


def attached(
    model: Any,
    experts: list[Any],
    site: str,
    criterion: Any,
    level: float,
    states: dict[str, State] | None,
    ids: Tensor = IDS,
) -> tuple[Tensor, Tensor]:
    """Logits, and zeros [slots, batch, tokens]."""
    with (
        torch.no_grad(),
        sparsified(model, experts, site, criterion, level, states) as counter,
    ):
        counter.expect(torch.ones_like(ids, dtype=torch.bool))
        made = model(input_ids=ids, use_cache=False).logits
        return made, counter.take()[0]


def check_against(
    loop: Loop, model: Any, experts: list[Any], site: str, criterion: Any, level: float, states: Any
) -> None:
    wanted = loop(IDS[:3])
    found, zeros = attached(model, experts, site, criterion, level, states, IDS[:3])
    for slot, counted in zip(slots_of(experts, site, criterion), zeros, strict=True):
        number = [part.layer for part in experts].index(slot.key.layer)
        plain = loop.zeros[number, slot.key.tensor]
        if not criterion.differs_by_expert and slot.key.tensor == "input":
            assert slot.width == HIDDEN
            plain = [zero // EACH for zero in plain]  # one row a token, where the loop has K
        assert counted.flatten().tolist() == plain
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def few(seen: Seen, experts: list[Any]) -> dict[int, list[int]]:
    """Experts with fewer rows than LEAST, by layer."""
    return {
        part.layer: [e for e in range(EXPERTS) if (seen.index[part.layer] == e).sum() < LEAST]
        for part in experts
    }


# Thresholds of magnitudes


@pytest.mark.parametrize("site", ["input", "up", "gate", "intermediate", "all_inputs"])
@pytest.mark.parametrize("how", ["per_layer", "per_expert"])
def test_quantiles(model: Any, experts: list[Any], seen: Seen, site: str, how: str) -> None:
    keys = {"expert_rows": LEAST} if how == "per_expert" else {}
    criterion = create({"rule": "quantile", "calibration": how, **keys})
    states = calibrated(criterion, experts, site, seen)
    layers = [part.layer for part in experts]
    lacking = few(seen, experts)
    assert any(lacking.values()), "no expert takes its layer's state: the test shows too little"
    assert any(len(one) < EXPERTS for one in lacking.values())
    expected = lacking if how == "per_expert" else {layer: list(range(EXPERTS)) for layer in layers}
    assert served_by_layer(experts, site, states) == {
        state_name(place.key): expected[place.layer] for place in places(experts, site)
    }

    def threshold(layer: int, tensor: str, expert: int) -> float:
        alone = None if expert in expected[layer] else expert
        ranked = np.sort(seen.rows(layer, tensor, alone).abs().flatten().numpy())
        return float(ranked[len(ranked) * 6 // 10])

    def keep(row: Tensor, own: Weights, number: int, tensor: str) -> Tensor:
        return row.abs() >= threshold(layers[number], tensor, own.number)

    loop = Loop(model, [part.paths[0] for part in experts], site, keep)
    check_against(loop, model, experts, site, criterion, 0.6, states)


def test_one_state_serves_all_rows_alike(experts: list[Any], seen: Seen) -> None:
    """By layer, the rule at the input is one for all experts: it is applied before rows are handed out."""
    criterion = create({"rule": "teal"})
    states = calibrated(criterion, experts, "input", seen)
    assert not any(
        isinstance(rule, ExpertRules)
        for rule in bind_all(criterion, experts, "input", states).values()
    )


# CETT


def cett(own: Weights, rows: Tensor, epsilon: float) -> Tensor:
    """‖W_d i_D‖ / ‖W_d i + b‖ of each row, in float64."""
    rows = rows.double()
    dropped = torch.where(rows.abs() * own.d.norm(dim=0) < epsilon, rows, 0)
    return (dropped @ own.d.T).norm(dim=-1)


@pytest.mark.parametrize("how", ["per_layer", "per_expert"])
def test_cett(model: Any, experts: list[Any], seen: Seen, how: str) -> None:
    level = 0.3
    keys = {"expert_rows": LEAST} if how == "per_expert" else {}
    criterion = create({"rule": "cett", "calibration": how, **keys})
    states = calibrated(criterion, experts, "intermediate", seen)
    lacking = few(seen, experts)
    epsilons: dict[tuple[int, int], float] = {}
    for place, part in zip(places(experts, "intermediate"), experts, strict=True):
        alone = [[e] for e in range(EXPERTS) if e not in lacking[place.layer]]
        groups = [(None, list(range(EXPERTS)))]
        if how == "per_expert":
            groups += [(e, [e]) for (e,) in alone]  # type: ignore[misc]
        for number, members in groups:
            epsilon = float(
                ErrorTable.from_state(states[state_name(place.key, number)]).at(level)[0]
            )
            errors = []
            for e in members:
                rows = seen.rows(place.layer, "intermediate", e)
                whole = part.experts[e].readers("intermediate")[0](rows).double().norm(dim=-1)
                errors.append(cett(Weights(part.routed.module, e), rows, epsilon) / whole)
            mean = float(torch.cat(errors).mean())
            assert mean == pytest.approx(level, rel=0.02)  # few rows: single entries count
            for e in members:
                epsilons[place.layer, e] = epsilon
    layers = [part.layer for part in experts]

    def keep(row: Tensor, own: Weights, number: int, tensor: str) -> Tensor:
        return row.abs() * own.d.norm(dim=0) >= epsilons[layers[number], own.number]

    loop = Loop(model, [part.paths[0] for part in experts], "intermediate", keep)
    check_against(loop, model, experts, "intermediate", criterion, level, states)


# Numbers by channel


def test_chess_and_mean_compensation_by_expert(model: Any, experts: list[Any], seen: Seen) -> None:
    for rule, site in (("chess", "gate"), ("mean_compensation", "up")):
        with pytest.raises(AtlasError, match="by channel, which no two experts share"):
            check_places(create({"rule": rule}), experts, site, rule)
        criterion = create({"rule": rule, "calibration": "per_expert", "expert_rows": LEAST})
        states = calibrated(criterion, experts, site, seen)
        for place in places(experts, site):
            for number in range(EXPERTS):
                if number in few(seen, experts)[place.layer]:
                    continue
                state = states[state_name(place.key, number)]
                if rule == "chess":
                    u = seen.rows(place.layer, "up", number)
                    torch.testing.assert_close(state["rms"], u.square().mean(0).sqrt())
                else:
                    g = seen.rows(place.layer, "gate", number)
                    torch.testing.assert_close(state["mean"], g.mean(0))
        bound = bind_all(criterion, experts, site, states)
        with torch.no_grad(), sparsified(model, experts, site, criterion, 0.5, states):
            model(input_ids=IDS, use_cache=False)
        assert all(isinstance(rule, ExpertRules) for rule in bound.values())


def test_means_take_the_place_of_what_is_dropped(experts: list[Any], seen: Seen) -> None:
    """A rule that replaces goes by each expert's rows: every row is what its own rule makes of it."""
    criterion = create({"rule": "mean_compensation", "calibration": "per_expert", "expert_rows": 1})
    states = calibrated(criterion, experts, "up", seen)
    place = next(iter(places(experts, "up")))
    rule = bind_all(criterion, experts, "up", states)[place.key]
    index = seen.index[place.layer]
    grouping = group(index, EXPERTS)
    u = seen.values[place.layer, "up"][grouping.order]
    i = seen.values[place.layer, "intermediate"][grouping.order]
    found = dropping(rule, 0.5)(u, i, grouping)
    for row, expert in enumerate(grouping.experts.tolist()):
        state = states.get(state_name(place.key, expert), states[state_name(place.key)])
        kept = u[row].abs() >= at_level(state["table"], 0.5)
        wanted = torch.where(kept, i[row], u[row] * state["mean"])
        torch.testing.assert_close(found.out[row], wanted)
        assert int(found.zeros[row]) == int((~kept).sum())


# A user's own


OWN = '''
import copy
from sparsity_atlas.criteria import Criterion


class Own(Criterion):
    """Keep |v_j| · ‖W[:, j]‖ above level times its mean over the calibration's rows."""

    dense_level = 0.0
    highest = 100.0
    coarse_levels = ("0.5",)
    calibrated = True
    looks_at_weights = True

    def calibrate(self, place, sample):
        values = sample.read(place.tensor)
        assert values.shape[1] == place.width
        return {"mean": (values.abs() * place.column_norms()).mean()}

    def bind(self, place, state):
        bound = copy.copy(self)
        bound.norms, bound.mean = place.column_norms(), state["mean"]
        return bound

    def mask(self, values, level):
        return values.abs().float() * self.norms >= level * self.mean
'''


@pytest.mark.parametrize("site", ["input", "intermediate"])
@pytest.mark.parametrize("how", ["per_layer", "per_expert"])
def test_a_rule_in_a_file(
    model: Any, experts: list[Any], seen: Seen, site: str, how: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    keys = {"expert_rows": LEAST} if how == "per_expert" else {}
    criterion = create({"file": str(tmp_path / "own.py"), "calibration": how, **keys})
    states = calibrated(criterion, experts, site, seen)
    layers, lacking = [part.layer for part in experts], few(seen, experts)
    norms = {
        (layer, e): Weights(part.routed.module, e).read_by(TENSORS[site][0]).norm(dim=0)
        for layer, part in zip(layers, experts, strict=True)
        for e in range(EXPERTS)
    }

    def mean(layer: int, tensor: str, expert: int) -> float:
        together = how == "per_layer" or expert in lacking[layer]
        members = range(EXPERTS) if together else [expert]
        rows = [seen.rows(layer, tensor, e).abs() * norms[layer, e] for e in members]
        return float(torch.cat(rows).mean())

    def keep(row: Tensor, own: Weights, number: int, tensor: str) -> Tensor:
        layer = layers[number]
        return row.abs() * norms[layer, own.number] >= 0.7 * mean(layer, tensor, own.number)

    loop = Loop(model, [part.paths[0] for part in experts], site, keep)
    check_against(loop, model, experts, site, criterion, 0.7, states)
    assert criterion.tried


# All built-in rules

REFUSED = {
    "prompt_mask": "it looks at whole sequences",
    "tda": "it looks at whole sequences",
    "r_sparse": "low-rank part of the weights of each expert",
}
BY_CHANNEL = ("bias_compensation", "chess", "mean_compensation")


@pytest.mark.parametrize("rule", rule_names())
def test_every_rule_works_or_says_why_not(
    model: Any, experts: list[Any], seen: Seen, rule: str
) -> None:
    spec: dict[str, Any] = {"rule": rule}
    if rule in BY_CHANNEL:
        spec |= {"calibration": "per_expert", "expert_rows": LEAST}
    criterion = create(spec)
    why = REFUSED.get(rule)
    if rule == "shifted_relu" and experts[0].activation is None:
        why = "of which no inverse is known"
    sites = set(criterion.sites or SITES) & {*FFN_TENSORS, "all_inputs"}
    for site in sorted(sites):
        if why is not None:
            for ask in (
                lambda site=site: check_places(criterion, experts, site, rule),
                lambda site=site: bind_all(criterion, experts, site, {}),
            ):
                with pytest.raises(AtlasError, match=why):
                    ask()
            continue
        check_places(criterion, experts, site, rule)
        states = calibrated(criterion, experts, site, seen) if criterion.calibrated else None
        level = float(criterion.coarse_levels[-1])
        made, zeros = attached(model, experts, site, criterion, level, states)
        assert torch.isfinite(made).all()
        assert zeros.any()
        for size in (1, 4) if site == min(sites) else ():
            found = [
                attached(model, experts, site, criterion, level, states, ids)
                for ids in IDS.split(size)
            ]
            assert torch.equal(torch.cat([one for _, one in found], 1), zeros)
            close: Callable[..., None] = torch.testing.assert_close
            close(torch.cat([one for one, _ in found]), made, rtol=1e-4, atol=1e-5)


def test_what_is_refused_is_known_without_a_model() -> None:
    for rule in rule_names():
        spec = {"rule": rule}
        why = why_not(declared(spec), spec)
        assert (why is not None) == (rule in REFUSED or rule in BY_CHANNEL)
    chosen: dict[str, Any] = {"rule": "chess", "calibration": "per_expert"}
    assert why_not(declared(chosen), chosen) is None
    chosen = {"rule": "teal", "allocation": "sensitivity"}
    assert "allocation" in (why_not(declared(chosen), chosen) or "")


@pytest.mark.parametrize("allocation", ["equal_cett", "sensitivity", "greedy", "evolutionary"])
def test_allocations_are_refused(experts: list[Any], allocation: str) -> None:
    criterion = create({"rule": "teal", "allocation": allocation})
    with pytest.raises(AtlasError, match="an allocation levels one error a layer"):
        check_places(criterion, experts, "all_inputs", "teal")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"rule": "topk", "calibration": "per_expert"},
            "topk: calibration: this rule is not calib",
        ),
        ({"rule": "topp", "expert_rows": 4}, "topp: expert_rows: this rule is not calibrated"),
        ({"rule": "teal", "calibration": "expert"}, "expected per_layer or per_expert, found 'exp"),
        ({"rule": "teal", "expert_rows": 4}, "teal: expert_rows: needs calibration: per_expert"),
        *(
            (
                {"rule": "teal", "calibration": "per_expert", "expert_rows": rows},
                "expert_rows: expected a whole number of at least 1, found",
            )
            for rows in (0, True, 1.5, "4")
        ),
    ],
)
def test_bad_keys(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        create(spec)
