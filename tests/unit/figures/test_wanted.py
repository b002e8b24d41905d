"""Figures that a configuration cannot fill are not made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from checkout import ROOT
from fake_results import make_results, make_tables
from mixtures import GIVEN, decorated
from sparsity_atlas.config.grid import pairs
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.figures import FIGURES, draw
from sparsity_atlas.figures.style import shows_nothing
from sparsity_atlas.figures.wanted import wanted
from sparsity_atlas.loading.contents import speaks_of_experts
from sparsity_atlas.tables.read import Tables

COMPARED = {"criteria", "comparison", "comparison_error"}
ALLOCATED = {"allocation", "allocation_damage"}
ROUTED = {"expert_sparsity", "expert_load"}
DENOISED = {"step_sparsity", "step_overlap", "step_layers"}
# Of five models, or named in `studies` or `layers`.
PROMPTS = {"prompt_overlap", "prompt_overlap_layers", "prompt_loss"}
ASKED_FOR = {"foretelling", "mask_recall", "local_dimension", "cett", "single_layers"}
ASKED_FOR |= {"speed", "speed_parts", "speed_batch"}
ASKED_FOR |= {"layer_profile", "truthfulness", "inserted", "inserted_gates", *PROMPTS}
# Of checkpoints of a training.
TRAINED = {"training", "training_limits"}
PHASES, TWINS = {"phase_sparsity"}, {"twins"}
LOSSES = {"ppl_sparsity", "added_loss"}
ACCURACIES = {"critical_sparsity", "retained_accuracy"}
TASKS = str(ROOT / "workflow/resources/tasks")
ONE = {"models": ["a"], "criteria": ["topp"], "sites": ["input", "up"], "tasks": ["prose"]}


def config_of(*blocks: dict[str, Any]) -> Config:
    return parse(
        {
            "models": {name: {"path": name} for name in ("a", "b")},
            "criteria": {"topp": {}, "topk": {}, "teal": {"allocation": "greedy"}},
            "texts": {"prose": {"file": "prose.jsonl"}},
            "tasks": {
                "prose": {"task": "atlas_prose", "include": TASKS},
                **{"gsm8k": {}, "arc_easy": {}, "blimp": {}},
                "counted": {"task": "atlas_prose", "include": TASKS, "metric": "acc"},
            },
            "calibration": {"tokens": 256},
            "run": list(blocks),
        }
    )


@pytest.mark.parametrize(
    ("blocks", "absent"),
    [
        ([ONE], {"scaling", "sensitivity", *COMPARED, *ALLOCATED}),
        ([{**ONE, "models": ["a", "b"]}], {"sensitivity", *COMPARED, *ALLOCATED}),
        ([{**ONE, "sensitivity": [0.9]}], {"scaling", *COMPARED, *ALLOCATED}),
        ([{**ONE, "criteria": ["topp", "topk"]}], {"scaling", "sensitivity", *ALLOCATED}),
        # Two criteria, but nowhere at the same site.
        (
            [ONE, {**ONE, "criteria": ["topk"], "sites": ["gate"]}],
            {"scaling", "sensitivity", *COMPARED, *ALLOCATED},
        ),
        ([{**ONE, "criteria": ["teal"]}], {"scaling", "sensitivity", *COMPARED}),
        # A criterion with one mask for all maps and with one each; another one with one each alone.
        (
            [ONE, {**ONE, "sites": ["input"]}, {**ONE, "sites": ["input"], "by_projection": True}],
            {"scaling", "sensitivity", *ALLOCATED, *COMPARED - {"comparison"}},
        ),
        (
            [
                {**ONE, "sites": ["input"]},
                {**ONE, "criteria": ["topk"], "sites": ["input"], "by_projection": True},
            ],
            {"scaling", "sensitivity", *ALLOCATED, *COMPARED},
        ),
    ],
)
def test_what_a_run_can_fill(blocks: list[dict[str, Any]], absent: set[str]) -> None:
    missing = set(FIGURES) - set(wanted(config_of(*blocks)))
    assert missing == absent | ACCURACIES | ROUTED | DENOISED | PHASES | TWINS | ASKED_FOR | TRAINED


def test_training_where_a_model_of_the_run_is_a_checkpoint() -> None:
    models = {"a": {"path": "a"}, "b": {"path": "b", "revisions": {"1": {"tokens": 1}}}}
    content = {**config_of(ONE).model_dump(exclude_unset=True), "models": models}
    assert not TRAINED & set(wanted(parse(content)))
    content["run"] = [{**ONE, "models": ["b"]}]
    assert set(wanted(parse(content))) >= TRAINED


@pytest.mark.parametrize("family", ["olmoe", "llama"])
def test_experts_where_a_model_may_have_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.chdir(tmp_path)
    AutoConfig.for_model("llama").save_pretrained("a")
    AutoConfig.for_model(family).save_pretrained("b")
    assert not ROUTED & set(wanted(config_of(ONE)))
    both = config_of({**ONE, "models": ["a", "b"]})
    assert bool(ROUTED & set(wanted(both))) == (family == "olmoe")


def test_phases_where_a_task_may_generate() -> None:
    assert not PHASES & set(wanted(config_of(ONE)))
    # What tasks of lm-eval's own do that its folders do not name is known when they are loaded.
    for task in ("gsm8k", "blimp"):
        assert set(wanted(config_of(ONE, {**ONE, "tasks": [task]}))) >= PHASES
    assert not PHASES & set(wanted(config_of(ONE, {**ONE, "tasks": ["arc_easy"]})))


@pytest.mark.parametrize(
    ("tasks", "absent"),
    [
        (["prose"], ACCURACIES),
        (["arc_easy"], LOSSES),
        (["prose", "arc_easy"], set()),
        (["blimp"], set()),
        # Of whole texts another number may be asked for.
        (["counted"], set()),
    ],
)
def test_a_loss_and_an_accuracy_where_a_task_may_have_one(
    tasks: list[str], absent: set[str]
) -> None:
    missing = set(FIGURES) - set(wanted(config_of({**ONE, "tasks": tasks})))
    assert missing & (LOSSES | ACCURACIES) == absent


@pytest.mark.parametrize("said", [{"is_causal": False}, {"mask_token_id": 5}, {}])
def test_steps_where_a_model_may_fill_masks_in_and_a_task_may_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    AutoConfig.for_model("llama", **said).save_pretrained("a")
    generated = {**ONE, "tasks": ["gsm8k"]}
    assert bool(DENOISED & set(wanted(config_of(generated)))) == bool(said)
    # Texts and options are scored.
    assert not DENOISED & set(wanted(config_of(ONE)))


@pytest.mark.parametrize(
    ("blocks", "pair", "there"),
    [
        ([{**ONE, "models": ["a", "b"]}], ["a", "b"], True),
        ([ONE], ["b", "a"], False),
        ([ONE, {**ONE, "models": ["b"], "sites": ["gate"]}], ["a", "b"], False),
        ([ONE, {**ONE, "models": ["b"], "criteria": ["topk"]}], ["a", "b"], False),
        ([ONE, {**ONE, "models": ["b"], "sites": ["gate", "up"]}], ["b", "a"], True),
    ],
)
def test_pairs_that_meet_at_a_criterion_and_site(
    blocks: list[dict[str, Any]], pair: list[str], there: bool
) -> None:
    config = config_of(*blocks).model_copy(update={"compare": [pair]})
    assert (set(wanted(config)) >= TWINS) == there
    assert pairs(config) == ((tuple(pair),) if there else ())


def test_of_a_model_of_the_hub_nobody_knows_before_it_is_here() -> None:
    config = config_of({**ONE, "tasks": ["gsm8k"]})
    model = config.models["a"].model_copy(update={"path": None, "hub": "some/model"})
    assert set(wanted(config.model_copy(update={"models": {"a": model}}))) >= ROUTED | DENOISED


@pytest.mark.parametrize("family", decorated())
def test_every_family_of_mixtures_speaks_of_experts(family: str, tmp_path: Path) -> None:
    for name in {family, f"{family}_text"} & set(CONFIG_MAPPING_NAMES):
        AutoConfig.for_model(name, **GIVEN.get(name, {})).save_pretrained(tmp_path / name)
        assert speaks_of_experts(tmp_path / name), name


def test_a_run_of_one_model_has_no_empty_frame_and_those_of_before_go(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = make_results(tmp_path / "results", models={"a": {}}, sites=("input", "up"))
    make_tables(results)
    names, folder = wanted(config_of(ONE)), tmp_path / "figures"
    folder.mkdir()
    (folder / "scaling.svg").write_text("of a run with two models")
    tables = [
        str(path) for path in results.glob("*.csv") if path.stem in Tables.__dataclass_fields__
    ]
    command = ["x", "--tables", *tables, "--output", str(folder), "--names", *names]
    monkeypatch.setattr("sys.argv", command)
    draw.main()
    assert sorted(path.stem for path in folder.glob("*.svg")) == sorted(names)
    assert not [path.stem for path in folder.glob("*.svg") if shows_nothing(path.read_bytes())]


def test_layers_are_set_side_by_side_where_one_threshold_is_among_the_rules() -> None:
    config = config_of({**ONE, "criteria": ["topp", "topk"]})
    assert "layer_profile" not in wanted(config)
    one = config.criteria["topp"].model_copy(update={"rule": "weighted_threshold"})
    criteria = {**config.criteria, "topk": one}
    assert "layer_profile" in wanted(config.model_copy(update={"criteria": criteria}))


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ({}, {"speed", "speed_parts"}),
        ({"tokens": [1, 4]}, {"speed", "speed_parts", "speed_batch"}),
        ({"contexts": []}, {"speed_parts"}),
    ],
)
def test_times_where_they_are_asked_for(asked: dict[str, Any], there: set[str]) -> None:
    found = set(wanted(config_of(ONE, {**ONE, "speed": {"device": "cpu", **asked}})))
    assert {name for name in found if name.startswith("speed")} == there


def test_prompts_masks_where_they_are_asked_for() -> None:
    config = config_of(ONE)
    studies = config.studies.model_copy(update={"prompt_reuse": ["given"]})
    assert set(wanted(config.model_copy(update={"studies": studies}))) >= PROMPTS
