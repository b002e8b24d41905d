"""The user's naming of modules is a hint to the probe, and is proved like everything else."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from model_parts import find_ffns, shown
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.find import observe
from sparsity_atlas.sites.probe.naming import expand, tree
from tiny_models import Strange, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

GATED = {"up": "yy.{layer}.k3.qov", "gate": "yy.{layer}.k3.mub", "down": "yy.{layer}.k3.arx"}
FUSED = {"gate_up": "yy.{layer}.k3.qov", "down": "yy.{layer}.k3.arx"}
UNGATED = {"up": "yy.{layer}.k3.qov", "down": "yy.{layer}.k3.arx"}


@pytest.mark.parametrize(
    ("layout", "modules"),
    [
        ("gated", GATED),
        ("gated", GATED | {"activation": "sigmoid"}),
        ("gated-shared", GATED | {"activation": "act"}),
        ("gated-shared", GATED | {"activation": "silu"}),
        ("gate_up", FUSED),
        ("gate_up", FUSED | {"order": "gate_up", "activation": "silu"}),
        ("up_gate", FUSED | {"order": "up_gate", "activation": "gelu_new"}),
        ("ungated", UNGATED | {"activation": "relu2"}),
    ],
)
def test_named_modules_are_found_as_by_the_search(layout: str, modules: dict[str, str]) -> None:
    model = Strange(layout)
    named = [ffn.describe() for ffn in find_ffns(model, modules)]
    searched = [ffn.describe() for ffn in find_ffns(model)]
    for entry in (*named, *searched):
        del entry["activation"]
    assert named == searched


def test_what_the_search_cannot_tell_apart_is_taken_as_named() -> None:
    model = Strange("bilinear")
    modules = GATED | {"activation": "linear"}
    swapped = modules | {"up": modules["gate"], "gate": modules["up"]}
    for naming, gate in ((modules, "mub"), (swapped, "qov")):
        ffns = find_ffns(model, naming)
        assert [ffn.gate.path for ffn in ffns] == [f"yy.{layer}.k3.{gate}" for layer in (0, 1)]
        seen: dict[str, torch.Tensor] = {}
        with (
            torch.no_grad(),
            observe(ffns, ["gate"], shown(lambda i, _, t, s=seen: s.update({i: t}))),
        ):
            model(token_ids())
        assert seen[1].shape == (2, 6, 40)


@pytest.mark.parametrize(
    ("layout", "modules", "message"),
    [
        (
            "gated",
            GATED | {"up": GATED["gate"], "gate": GATED["up"]},
            "modules: layer 0: the input of yy.0.k3.arx is not yy.0.k3.mub ⊙ ",
        ),
        (
            "gated",
            GATED | {"activation": "silu"},
            "is not yy.0.k3.qov ⊙ silu(yy.0.k3.mub), the best fit of what was named: relative error",
        ),
        ("gate_up", FUSED | {"order": "up_gate"}, "yy.0.k3.qov[half 0] ⊙ "),
        ("scaled", GATED, "yy.0.k3.qov ⊙ "),
        ("gated", UNGATED, "is not "),
        ("gated", GATED | {"up": "yy.{layer}.k2.jx"}, "do not fit together"),
        ("other-input", GATED, "do not fit together"),
        (
            "gated",
            {**UNGATED, "up": "yy.{layer}.k3.zz"},
            "up: the model has no module 'yy.0.k3.zz'",
        ),
        ("gated", {**UNGATED, "up": "yy.{layer}.k3.zz"}, "yy.0.k3 is {qov: Linear(16→40), mub: "),
        ("gated", {**UNGATED, "up": "nowhere"}, "one module for all layers; write {layer}"),
        ("gated", {**GATED, "wide": "x"}, "unknown key 'wide'; known: up, gate, gate_up, order"),
        ("gated", {"down": GATED["down"]}, "found down; expected `down` and either `up`"),
        ("gated", GATED | FUSED, "expected `down` and either `up`"),
        ("gate_up", FUSED | {"gate": GATED["gate"]}, "give `gate` beside `up`, or `gate_up`"),
        ("gate_up", FUSED | {"order": "both"}, "order: found 'both'; expected gate_up or up_gate"),
        ("gated", GATED | {"order": "gate_up"}, "order: found 'gate_up'; expected"),
        ("gated", GATED | {"activation": "wave"}, "activation: 'wave' is neither a module of the"),
    ],
)
def test_a_naming_that_is_wrong_is_refused_in_one_line(
    layout: str, modules: dict[str, str], message: str
) -> None:
    with pytest.raises(AtlasError, match=re.escape(message)) as caught:
        find_ffns(Strange(layout), modules)
    assert "\n" not in str(caught.value)


def test_a_named_module_that_never_runs_is_refused() -> None:
    model = Strange("gated")
    for block in model.yy:
        block["idle"] = nn.Linear(16, 40)
    with pytest.raises(AtlasError, match=r"modules: yy\.0\.idle: did not run in a forward pass"):
        find_ffns(model, GATED | {"up": "yy.{layer}.idle"})


def test_the_configuration_says_how_many_layers_are_named() -> None:
    modules = {
        "up": "model.layers.{layer}.mlp.up_proj",
        "gate": "model.layers.{layer}.mlp.gate_proj",
        "down": "model.layers.{layer}.mlp.down_proj",
    }
    model = tiny_model("llama", num_hidden_layers=3)
    assert len(find_ffns(model, modules)) == 3
    with pytest.raises(AtlasError, match=r"no module 'model\.layers\.3\.mlp"):
        expand(model, modules, layers=4)


def test_the_tree_draws_equal_neighbours_once_and_is_cut() -> None:
    model = Strange("gated", layers=3)
    assert "yy: {0-2: {k1: LayerNorm" in tree(model)
    assert tree(model, limit=20).endswith("…")
    assert "Conv1D(16→40)" in tree(tiny_model("gpt2"), limit=10_000)
