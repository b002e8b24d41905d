"""Allocations: targets that are kept, equal damage, and the greedy path against a search by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fake_results import make_results, make_tables
from model_parts import by_tensor, ffns_of, find_ffns, shown
from sparsity_atlas.calibrate import evolution
from sparsity_atlas.calibrate.allocation import (
    ERROR_GRID,
    LOSS_GRID,
    allocate,
    block_error,
    error_of,
    greedy,
    layer_errors,
    single_losses,
    spread,
)
from sparsity_atlas.calibrate.divergence import Divergence
from sparsity_atlas.criteria import Criterion, create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.calibration_file import write_calibration
from sparsity_atlas.criteria.level_table import TARGETS
from sparsity_atlas.criteria.place import Place, places, state_name
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.figures import layer_by_level
from sparsity_atlas.sites.block import blocks
from sparsity_atlas.sites.find import Part, find_parts, intercept, observe
from sparsity_atlas.sparsify.attach import sparsified
from sparsity_atlas.tables.read import Tables
from sparsity_atlas.terms import TENSORS, PlaceKey
from tiny_models import tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def test_spread_by_hand() -> None:
    """Damages s² and 4 s²: the second place takes half of the first one's sparsity."""
    grid = np.linspace(0, 1, 401)
    table = spread(np.array([grid**2, 4 * grid**2]), grid, np.array([1.0, 1.0]))
    for target in (0.15, 0.3, 0.6):
        column = table[:, np.searchsorted(TARGETS, target - 1e-9)]
        assert column == pytest.approx([4 * target / 3, 2 * target / 3], rel=0.01)
    # The first is at its end, and the second has the rest to itself.
    assert table[:, 90] == pytest.approx([1, 0.8], abs=0.01)


def test_what_is_free_is_dropped_first_and_never_too_much() -> None:
    """Exact zeros of a ReLU: half of both places is free, and a fifth is asked for."""
    grid = np.linspace(0, 1, 21)
    damage = np.array([np.maximum(grid - 0.5, 0), 2 * np.maximum(grid - 0.5, 0)])
    table = spread(damage, grid, np.array([3.0, 1.0]))
    assert table[:, 20] == pytest.approx([0.2, 0.2])
    assert np.array([3, 1]) / 4 @ table[:, 60] == pytest.approx(0.6)
    assert table[0, 60] > table[1, 60] > 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 5), min_size=7, max_size=7), min_size=1, max_size=5), st.data()
)
def test_every_target_is_kept(damage: list[list[float]], data: st.DataObject) -> None:
    weights = np.array(
        data.draw(st.lists(st.integers(1, 9), min_size=len(damage), max_size=len(damage)))
    )
    table = spread(np.array(damage), LOSS_GRID, weights.astype(float))
    assert (weights / weights.sum()) @ table == pytest.approx(TARGETS, abs=1e-6)
    assert (table >= -1e-12).all()
    assert (table <= 1 + 1e-12).all()
    assert (np.diff(table, axis=1) >= -1e-12).all()


def test_a_damage_that_is_no_number() -> None:
    with pytest.raises(AtlasError, match="allocation: dropping makes NaN"):
        spread(np.array([[0, np.nan, 1.0]]), np.linspace(0, 1, 3), np.array([1.0]))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A random Llama with layers of unlike importance."""
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        for scale, ffn in zip((3.0, 1.0, 0.1), find_ffns(model), strict=True):
            ffn.down.module.weight *= scale
    return model


@pytest.fixture(scope="module")
def decided() -> torch.nn.Module:
    """The same, with logits that tell tokens apart."""
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.lm_head.weight *= 40
        for scale, ffn in zip((30.0, 10.0, 1.0), find_ffns(model), strict=True):
            ffn.down.module.weight *= scale
    return model


IDS = token_ids(batch=6, tokens=24, seed=3)


def activations(parts: list[Part], model: torch.nn.Module) -> dict[tuple[int, str], Tensor]:
    found: dict[tuple[int, str], Tensor] = {}
    with (
        torch.no_grad(),
        observe(
            parts,
            ["all_linear_inputs", "gate", "up"],
            shown(lambda layer, name, v: found.update({(layer, name): v.flatten(0, 1).clone()})),
        ),
    ):
        model(IDS)
    return found


class Given:
    """A `place.Sample` of one layer."""

    def __init__(self, found: dict[tuple[int, str], Tensor], layer: int) -> None:
        self.found, self.layer = found, layer

    def read(self, tensor: str) -> Tensor:
        return self.found[self.layer, tensor]


def sources_among(
    found: dict[tuple[int, str], Tensor],
) -> Callable[[Part, str], dict[str, Tensor]]:
    """What `allocate` asks for, of captured tensors."""
    return lambda part, site: {name: found[part.layer, name] for name in part.sources(site)}


def allocated(
    model: torch.nn.Module, rule: str, site: str, allocation: str
) -> tuple[list[Part], dict, dict[tuple[int, str], Criterion], dict]:
    parts = find_parts(model)
    found = activations(parts, model)
    criterion = create({"rule": rule, "allocation": allocation})
    states = {
        state_name(place.key): criterion.calibrate(place, Given(found, place.layer))
        for place in places(parts, site)
    }
    shares = allocate(criterion, parts, site, states, sources_among(found), IDS.numpy())
    states = {name: {**states[name], **shares[name]} for name in states}
    return parts, found, by_tensor(bind_all(criterion, parts, site, states)), shares


@pytest.mark.parametrize(
    ("rule", "site"),
    [
        *(("teal", "input"), ("cats", "gate"), ("countdown_m", "up"), ("chess", "gate")),
        *(("teal", "o_input"), ("teal", "all_linear_inputs")),
    ],
)
@pytest.mark.parametrize("allocation", ["equal_cett", "sensitivity"])
def test_induced_sparsity_is_the_level(
    model: torch.nn.Module, rule: str, site: str, allocation: str
) -> None:
    _, found, bound, _ = allocated(model, rule, site, allocation)
    for level in (0.25, 0.5, 0.8):
        dropped = [
            float((~one.mask(found[key], level)).double().mean()) for key, one in bound.items()
        ]
        widths = [found[key].shape[-1] for key in bound]
        assert np.average(dropped, weights=widths) == pytest.approx(level, abs=0.01)
        # Errors are relative, so that only a loss tells the layers of this model apart.
        assert allocation == "equal_cett" or max(dropped) - min(dropped) > 0.05


def test_equal_cett_has_equal_errors(model: torch.nn.Module) -> None:
    parts, found, bound, _ = allocated(model, "quantile", "intermediate", "equal_cett")
    for level in (0.3, 0.6):
        errors = []
        for ffn in ffns_of(parts):
            x, i = found[ffn.layer, "input"], found[ffn.layer, "intermediate"]
            with torch.no_grad():
                dense = ffn.down(i)
                sparse = ffn.down(i * bound[ffn.layer, "intermediate"].mask(i, level))
            errors.append(float(((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean()))
            assert len(x) == len(i)
        assert max(errors) == pytest.approx(min(errors), rel=0.1)


def test_errors_of_a_layer_by_hand(model: torch.nn.Module) -> None:
    ffn = find_ffns(model)[0]
    bound = bind_all(create({"rule": "random"}), [ffn], "all_inputs")
    x = torch.randn(50, ffn.hidden)
    with torch.no_grad():
        # Of `random` the level is what is kept: 0 drops all of one tensor, and all of the other.
        error = error_of([ffn], lambda *_: {"input": x}, "all_inputs", bound)
        found = layer_errors(error, list(bound), np.array([0.0]))
        assert found.shape == (2, 1)
        assert found == pytest.approx(1.0, abs=1e-6)


def test_sensitivity_is_the_loss_of_one_layer_alone(model: torch.nn.Module) -> None:
    ffns = find_ffns(model)
    bound = bind_all(create({"rule": "topk"}), ffns, "intermediate")
    with torch.no_grad():
        found = single_losses(ffns, "intermediate", bound, IDS, np.array([0.0, 0.25]), batch=4)

        def loss() -> float:
            logits = model(IDS).logits[:, :-1]
            return float(F.cross_entropy(logits.flatten(0, 1).double(), IDS[:, 1:].flatten()))

        dense = loss()
        for ffn, row in zip(ffns, found, strict=True):
            rule = bound[PlaceKey(ffn.layer, "ffn", "intermediate")]
            handle = ffn.down.module.register_forward_pre_hook(
                lambda _, args, rule=rule: (
                    args[0] * rule.mask(args[0].flatten(0, 1), 0.25).view_as(args[0])
                )
            )
            assert row == pytest.approx([0, loss() - dense], abs=1e-5)
            handle.remove()


def test_greedy_takes_the_cheapest_step(model: torch.nn.Module) -> None:
    _, found, bound, _ = allocated(model, "teal", "all_inputs", "greedy")
    ffn = find_ffns(model)[0]
    rules = {name: rule for (layer, name), rule in bound.items() if layer == 0}
    for rule in rules.values():
        rule._share = None
    parameters = np.array([Place(ffn, name).weight.numel() for name in rules], float)
    with torch.no_grad():
        there = {PlaceKey(0, "ffn", name): rule for name, rule in rules.items()}
        error_there = error_of([ffn], sources_among(found), "all_inputs", there)
        table = greedy(error_there, list(there), parameters)
    share = parameters / parameters.sum()
    assert share == pytest.approx([2 / 3, 1 / 3])  # W_u and W_g read x
    assert share @ table == pytest.approx(TARGETS, abs=1e-6)
    assert (np.diff(table, axis=1) >= 0).all()
    # Along the path no swap of a step between the two tensors helps much at its beginning.
    x = found[0, "input"]

    def error(levels: np.ndarray) -> float:
        with torch.no_grad():
            kept = torch.where(rules["input"].mask(x, float(levels[0])), x, 0)
            i = ffn.intermediate(kept)
            kept = torch.where(rules["intermediate"].mask(i, float(levels[1])), i, 0)
            dense = ffn.down(ffn.intermediate(x))
            return float(((ffn.down(kept) - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())

    errors = [error(column) for column in table.T]
    assert all(later >= before - 1e-3 for before, later in pairwise(errors[:80]))
    uniform = error(np.array([0.4, 0.4]))
    assert errors[40] <= uniform + 1e-3


def test_greedy_steps_by_equal_parameters() -> None:
    """A step of the smaller tensor is twice as long: its entries are cheaper, its parameters are not."""
    x, i = (PlaceKey(0, "ffn", name) for name in ("input", "intermediate"))
    table = greedy(lambda at: at[x] + 0.6 * at[i], [x, i], np.array([2.0, 1.0]))
    assert table[:, 50] == pytest.approx([0.75, 0], abs=1e-6)
    assert table[:, 80] == pytest.approx([1, 0.4], abs=0.02)


def test_greedy_steps_are_those_of_teal() -> None:
    """0.05 of the tensor that meets the fewest parameters; of the others as many parameters."""
    qkv, o, x = (PlaceKey(0, "any", name) for name in ("qkv_input", "o_input", "input"))
    tried: dict[PlaceKey, set[float]] = {qkv: set(), o: set(), x: set()}

    def error(at: dict[PlaceKey, float]) -> float:
        for name, level in at.items():
            tried[name].add(round(level, 6))
        return sum(at.values())

    greedy(error, list(tried), np.array([1.5, 1.0, 7.0]))
    assert [sorted(levels)[1] for levels in tried.values()] == [0.033333, 0.05, 0.007143]
    assert sorted(tried[o]) == pytest.approx(np.linspace(0, 1, 21))


def test_greedy_at_all_linear_inputs_goes_by_the_whole_block(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block's output with its tensors dropped is what the model itself makes of it there."""
    monkeypatch.setattr("sparsity_atlas.calibrate.allocation.STEP", 0.25)  # five times as fast
    parts, _, bound, shares = allocated(model, "teal", "all_linear_inputs", "greedy")
    for state in shares.values():
        assert (np.diff(state["share"].numpy()) >= 0).all()
    seen: list[Tensor] = []
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(
        lambda _, __, output: seen.append(output if torch.is_tensor(output) else output[0])
    )

    def rewrite(at: int, name: str, values: Tensor, onto: Tensor) -> Tensor | None:
        if at != 0:
            return None
        mask = bound[0, name].mask(values.flatten(0, 1), 0.5).view_as(values)
        return torch.where(mask, onto, 0)

    with torch.no_grad():
        model(IDS)
        with intercept(parts, "all_linear_inputs", shown(rewrite)):
            model(IDS)
        handle.remove()
        dense, sparse = (one.flatten(0, 1) for one in seen)
        by_hand = float(((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())
        names = {part.name: part.tensors for part in parts if part.layer == 0}
        rules = {
            PlaceKey(0, part, tensor): bound[0, tensor]
            for part, tensors in names.items()
            for tensor in TENSORS["all_linear_inputs"]
            if tensor in tensors
        }
        error = block_error(blocks(parts, IDS)[0], rules)
        assert error(dict.fromkeys(rules, 0.5)) == pytest.approx(by_hand, rel=1e-5)
        assert error(dict.fromkeys(rules, 0.0)) == 0
    assert by_hand > 0.01


def test_evolution_finds_the_best_allocation_of_all(
    decided: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every allocation of a few steps among three layers, by the model's own predictions."""
    monkeypatch.setattr(evolution, "STEP", 0.25)
    monkeypatch.setattr(evolution, "LEVELS", np.array([0.5]))
    parts, _, bound, shares = allocated(decided, "teal", "intermediate", "evolutionary")
    table = np.array([state["share"].numpy() for state in shares.values()])
    assert table.mean(0) == pytest.approx(TARGETS)
    # Each rule at what its layer has: `bound` is by layer, and knows its share.
    rules = {PlaceKey(layer, "ffn", name): rule for (layer, name), rule in bound.items()}
    divergence = Divergence(parts, "intermediate", IDS, 4)

    def cost(steps: tuple[int, ...]) -> float:
        for rule, step in zip(rules.values(), steps, strict=True):
            rule._share = np.full(len(TARGETS), 0.5 + 0.25 * step)
        return divergence(rules, 0.5)

    every = [steps for steps in product(range(-2, 3), repeat=3) if sum(steps) == 0]
    best = min(every, key=cost)
    assert best != (0, 0, 0)
    assert table[:, 50] == pytest.approx(0.5 + 0.25 * np.array(best))


def test_evolution_keeps_the_target_over_all_parameters(
    decided: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks first, and greedy within them; what is tried begins with all alike, and with greedy's own."""
    monkeypatch.setattr(evolution, "LEVELS", np.array([0.3, 0.6]))
    with caplog.at_level("INFO"):
        parts, _, bound, shares = allocated(decided, "teal", "all_inputs", "evolutionary")
    own = {name: state["share"].numpy() for name, state in shares.items()}
    weights = [
        place.part.size(place.tensor) * place.part.outputs(place.tensor)
        for place in places(parts, "all_inputs")
    ]
    assert np.average(list(own.values()), axis=0, weights=weights) == pytest.approx(TARGETS)
    # The log says what was found beside what both even ways cost.
    greedy_own = allocated(decided, "teal", "all_inputs", "greedy")[3]
    for level, line in zip((0.3, 0.6), caplog.messages, strict=True):
        found, alike, divided = map(float, re.findall(r"\d\.\d{2,}", line))
        rules = {PlaceKey(layer, "ffn", name): rule for (layer, name), rule in bound.items()}
        divergence = Divergence(parts, "all_inputs", IDS, 4)
        for expected, tables in (
            *((found, own), (divided, {n: s["share"].numpy() for n, s in greedy_own.items()})),
            (alike, dict.fromkeys(own, TARGETS)),
        ):
            for key, rule in rules.items():
                rule._share = tables[state_name(key)]
            assert divergence(rules, level) == pytest.approx(expected, rel=1e-3)
        assert found <= min(alike, divided)


def test_divergence_is_that_of_the_definition(decided: torch.nn.Module) -> None:
    """Σ p ln (p / q) in float64, in batches of unlike size; 0 where nothing is dropped."""
    parts = find_parts(decided)
    bound = bind_all(create({"rule": "topk"}), parts, "intermediate")
    divergence = Divergence(parts, "intermediate", IDS, 4)
    assert divergence(bound, 1.0) == 0

    def logits() -> Tensor:
        with torch.no_grad():
            return decided(IDS).logits.double().log_softmax(-1)

    dense = logits()
    with sparsified(decided, parts, "intermediate", create({"rule": "topk"}), 0.25) as counter:
        counter.expect(torch.ones_like(IDS, dtype=torch.bool))
        sparse = logits()
    by_hand = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert by_hand > 0.01
    assert divergence(bound, 0.25) == pytest.approx(by_hand, rel=1e-3)


def test_a_table_says_what_it_was_made_from(model: torch.nn.Module) -> None:
    for name, grid in (("equal_cett", ERROR_GRID), ("sensitivity", LOSS_GRID)):
        _, _, _, shares = allocated(model, "teal", "input", name)
        for state in shares.values():
            assert state["grid"].tolist() == grid.tolist()
            assert state["damage"].shape == state["grid"].shape
            assert state["share"].shape == TARGETS.shape


@pytest.mark.parametrize("rule", ["cett", "shifted_relu", "r_sparse"])
def test_rules_without_an_allocation(rule: str) -> None:
    with pytest.raises(AtlasError, match=rf"criteria: {rule}: .*allocation"):
        create({"rule": rule, "allocation": "greedy"})


def test_unknown_allocation() -> None:
    with pytest.raises(AtlasError, match="teal: allocation: expected uniform, equal_cett, sensi"):
        create({"rule": "teal", "allocation": "best"})


# Tables and figures


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """A criterion with an allocation beside one without."""
    results = tmp_path_factory.mktemp("allocation")
    make_results(results, {"m": {}}, criteria=("topk", "teal"), sites=("input",))
    states = {
        f"input.{layer}": {
            "table": torch.zeros(3),
            "share": torch.linspace(0, 1, 101) ** (1 + layer),
            "grid": torch.tensor([0, 0.5, 1]),
            "damage": torch.tensor([0, 0.01, 0.1]) * (1 + layer),
        }
        for layer in range(3)
    }
    about = {"criterion": {"rule": "teal", "allocation": "sensitivity"}, "text": "", "tokens": 1}
    write_calibration(results / "m/teal/input/calibration.safetensors", states, about)

    return make_tables(results)


def test_the_table_of_an_allocation(tables: Tables) -> None:
    rows = tables.allocation
    assert set(rows["criterion"]) == {"teal"}
    assert set(rows["allocation"]) == {"sensitivity"}
    row = rows.query("layer == 1 and sparsity == 0.5").iloc[0]
    assert row["damage"] == pytest.approx(0.02)
    assert row["own_sparsity"] == pytest.approx(0.25)


def test_figures_of_an_allocation(tables: Tables) -> None:
    for draw, shape in ((layer_by_level.damage, 3 * 2), (layer_by_level.own_sparsity, 3 * 3)):
        figure = draw(tables)
        panel = figure.axes[0]
        assert panel.get_title() == "m · teal\ninput"
        assert panel.collections[0].get_array().size == shape
    none = replace(tables, allocation=tables.allocation[:0])
    for draw in (layer_by_level.damage, layer_by_level.own_sparsity):
        assert "No criterion of this run has an allocation." in draw(none).texts[0].get_text()
