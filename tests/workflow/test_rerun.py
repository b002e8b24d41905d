"""What runs again after a change, and what does not.

Most are dry runs on one finished run of the smoke configuration, whose files are changed and put back.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from checkout import Checkout, smoke_config, turn_signs

# Jobs that load a model, and the captures' metrics.
HEAVY = (
    "model",
    "capture",
    "metrics",
    "output_error",
    "dense",
    "evaluate",
    "search",
    "sensitivity",
)
# Files of the task that the smoke configuration runs.
TASK = "workflow/resources/tasks/" + smoke_config()["tasks"]["few_pairs"]["task"].removeprefix(
    "atlas_"
)
# They read what every model and curve left.
COMMON = {"all", "run_config", "tables", "figures", "page"}


@pytest.fixture(scope="session")
def two_models(smoke: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The smoke run, to which a model was added. Leave it as it is."""
    checkout = smoke.copy(tmp_path_factory.mktemp("two") / "atlas")
    checkout.add_model("other")
    return checkout


def with_other(config: dict[str, Any], **entry: Any) -> dict[str, Any]:
    """The configuration with a second model, which has one curve."""
    config["models"] = {"other": {"path": "models/other", **entry}}
    block = {
        "criteria": ["topp"],
        "sites": ["intermediate"],
        "levels": [0.9],
        "tasks": ["few_pairs"],
    }
    config["run"].append({"models": ["other"], **block})
    return config


def searched_levels(checkout: Checkout, folder: str) -> list[str]:
    """Levels that a search chose."""
    search = json.loads((checkout.results / folder / "search.json").read_text())
    return [one["level"] for one in search["levels"]]


def test_second_run_does_nothing(smoke: Checkout) -> None:
    before = smoke.times()
    done = smoke.run()
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout
    assert smoke.times() == before


@pytest.mark.parametrize("state", [True, False], ids=["with .snakemake", "results only"])
def test_results_in_a_fresh_clone(smoke: Checkout, tmp_path: Path, state: bool) -> None:
    moved = smoke.copy(tmp_path / "elsewhere", state=state)
    planned = moved.plan()
    assert planned.returncode == 0, planned.text
    assert planned.jobs == set()


@pytest.mark.parametrize("block", [0, 2], ids=["beside a search", "to a list"])
def test_a_level_added(smoke: Checkout, config: dict[str, Any], block: int) -> None:
    if block == 0:
        config["run"].append({**config["run"][0], "sites": ["input"], "levels": [0.95]})
        folder, level = "zoo-small/topp/input", "0.95"
    else:
        config["run"][1]["levels"].append(0.7)
        folder, level = "zoo-small/topk/intermediate", "0.7"
    planned = smoke.plan(config=config)
    assert planned.of(*HEAVY) == {
        f"evaluate {folder}/{level}/eval.json",
        f"output_error {folder}/sparsity.parquet",
    }
    assert planned.of("curve") == {f"curve {folder}/curve.json"}


def test_a_site_added(smoke: Checkout, config: dict[str, Any]) -> None:
    config["run"][1]["sites"].append("up")
    planned = smoke.plan(config=config)
    assert planned.of(*HEAVY) == {
        "capture zoo-small/capture/up.json",
        "metrics zoo-small/metrics/up.parquet",
        "output_error zoo-small/topk/up/sparsity.parquet",
        "evaluate zoo-small/topk/up/0.9/eval.json",
        "evaluate zoo-small/topk/up/0.5/eval.json",
        "sensitivity zoo-small/topk/up/sensitivity.parquet",
    }


def test_a_sensitivity_level_added(smoke: Checkout, config: dict[str, Any]) -> None:
    config["run"][1]["sensitivity"].append(0.9)
    planned = smoke.plan(config=config)
    folder = "zoo-small/topk/intermediate"
    assert planned.of(*HEAVY, "curve") == {f"sensitivity {folder}/sensitivity.parquet"}
    assert planned.of("tables")


def test_times_asked_for(smoke: Checkout, config: dict[str, Any]) -> None:
    """The curve is timed, once all of it is there, and nothing else of it runs again."""
    config["run"][1]["speed"] = {"device": "cpu", "tokens": [1, 2]}
    planned = smoke.plan(config=config)
    assert planned.of(*HEAVY, "curve") == set()
    assert planned.of("speed") == {"speed zoo-small/topk/intermediate/speed.parquet"}
    assert planned.of("tables")


def test_a_study_taken_away(smoke: Checkout, config: dict[str, Any]) -> None:
    """Its file stays, and no table shows it."""
    del config["run"][1]["sensitivity"]
    planned = smoke.plan(config=config)
    assert planned.of(*HEAVY, "curve") == set()
    assert planned.of("tables")


def test_a_sites_capture_adds_its_tensor_only(
    smoke: Checkout, config: dict[str, Any], tmp_path: Path
) -> None:
    config["run"][1]["sites"].append("up")
    checkout = smoke.copy(tmp_path / "atlas")
    before = checkout.times()
    passes = checkout.run_well("results/zoo-small/capture/up.json", config=config)
    # 512 tokens in sequences of 64, 16 a batch.
    assert passes == ["capture zoo-small/capture/up.json"]
    after = checkout.times()
    new = {str(Path(name).relative_to(checkout.results)) for name in after.keys() - before.keys()}
    store = {name for name in new if name.startswith("zoo-small/activations.zarr/")}
    assert store
    assert all(name.startswith("zoo-small/activations.zarr/up") for name in store)
    assert "zoo-small/capture/up.json" in new
    old = "activations.zarr/intermediate/", "activations.zarr/input/", "model.json"
    for name in before:
        if any(part in name for part in old) or name.endswith(old[-1]):
            assert after[name] == before[name]


def test_a_task_added(smoke: Checkout, config: dict[str, Any]) -> None:
    config["tasks"]["again"] = config["tasks"]["few_pairs"]
    for block in config["run"]:
        block["tasks"] = ["few_pairs", "again"]
    planned = smoke.plan(config=config)
    assert planned.of("model", "capture", "metrics") == set()
    assert planned.of("dense", "evaluate", "search") == {
        "dense zoo-small/dense/eval.json",
        "evaluate zoo-small/topk/intermediate/0.9/eval.json",
        "evaluate zoo-small/topk/intermediate/0.5/eval.json",
        "search zoo-small/topp/intermediate/search.json",
        "search zoo-small/topp/input/search.json",
    }


def test_a_task_added_runs_alone(smoke: Checkout, config: dict[str, Any], tmp_path: Path) -> None:
    # The same questions under a new name: as many passes as the task took that is there already.
    config["tasks"]["again"] = config["tasks"]["few_pairs"]
    for block in config["run"]:
        block["tasks"] = ["few_pairs", "again"]
    made = {  # by the stage that makes it
        "evaluate zoo-small/dense/eval.json",
        "evaluate zoo-small/topk/intermediate/0.9/eval.json",
        "search zoo-small/topp/input/search.json",
    }
    checkout = smoke.copy(tmp_path / "atlas")
    paths = [f"results/{one.split()[1]}" for one in made]
    passes = Counter(checkout.run_well(*paths, config=config))
    first = Counter(smoke.forwards())
    assert passes == {one: first[one] for one in made}


def test_a_model_added(two_models: Checkout, config: dict[str, Any]) -> None:
    planned = two_models.plan(config=with_other(config))
    assert {job for job in planned.jobs if job.split()[0] not in COMMON} == {
        "model other/model.json",
        "capture other/capture/intermediate.json",
        "metrics other/metrics/intermediate.parquet",
        "dense other/dense/eval.json",
        "evaluate other/topp/intermediate/0.9/eval.json",
        "output_error other/topp/intermediate/sparsity.parquet",
        "curve other/topp/intermediate/curve.json",
        "model_summary other/summary.csv",
    }


def test_a_models_entry_edited(two_models: Checkout, config: dict[str, Any]) -> None:
    done = two_models.run(config=with_other(config))
    assert done.returncode == 0, done.stdout
    assert two_models.plan(config=config).jobs == set()

    config["models"]["other"]["batch_size"] = 8
    planned = two_models.plan(config=config)
    assert planned.of("capture", "dense", "evaluate")
    own = {job for job in planned.jobs if job.split()[0] not in COMMON}
    assert all(job.split()[1].startswith("other/") for job in own)
    # How a model is run is no part of what it is.
    assert planned.of("model") == set()

    del config["models"]["other"]["batch_size"]
    folder = two_models.path / "models" / "other"
    turn_signs(folder)
    planned = two_models.plan(config=config)
    own = {job for job in planned.jobs if job.split()[0] not in COMMON}
    assert "model other/model.json" in own
    assert all(job.split()[1].startswith("other/") for job in own)
    assert {job.split()[0] for job in own} >= {"capture", "metrics", "dense", "evaluate", "curve"}
    # A change taken back is no change.
    turn_signs(folder)
    assert two_models.plan(config=config).jobs == set()


@pytest.mark.parametrize(
    "node", ["topk/intermediate/0.9", "topp/input/{level}"], ids=["listed", "searched"]
)
def test_a_node_deleted(smoke: Checkout, node: str) -> None:
    node = "zoo-small/" + node.format(level=searched_levels(smoke, "zoo-small/topp/input")[0])
    with smoke.without(node):
        once = {f"evaluate {node}/eval.json"}
        assert smoke.plan(f"results/{node}/eval.json").jobs == once
        assert smoke.plan().of(*(set(HEAVY) - {"output_error"})) == once


def test_a_node_made_again_is_the_same(smoke: Checkout, tmp_path: Path) -> None:
    checkout = smoke.copy(tmp_path / "atlas")
    levels = searched_levels(checkout, "zoo-small/topp/input")
    node = f"zoo-small/topp/input/{levels[0]}"
    before = checkout.contents()
    with checkout.without(node):
        passes = checkout.run_well()
        after = checkout.contents()
        (checkout.results / node).rename(tmp_path / "made again")
    assert after == before
    # A search of three levels left it; now it is one evaluation with a third of the passes.
    searched = Counter(smoke.forwards())["search zoo-small/topp/input/search.json"]
    assert Counter(passes) == {f"evaluate {node}/eval.json": searched // len(levels)}


# Source file, the rules that run again for it among HEAVY and `curve`, and whose paths they have.
SOURCES = {
    "activations/capture.py": {"capture", "metrics", "output_error", "sensitivity"},
    "activations/store.py": {"capture", "metrics", "output_error", "sensitivity"},
    "activations/metrics.py": {"metrics"},
    "studies/output_error.py": {"output_error"},
    "studies/sensitivity.py": {"sensitivity"},
    # Nothing of the smoke run is timed.
    "speed/measure.py": set(),
    "decoding/maps.py": set(),
    "evaluation/evaluate.py": {"dense", "evaluate", "search", "curve", "output_error"},
    "lm/model.py": {"dense", "evaluate", "search", "curve", "output_error"},
    "activations/spool.py": {"capture", "metrics", "output_error", "sensitivity"},
    "kernels/cpu.py": {"dense", "evaluate", "search", "curve", "output_error", "sensitivity"},
    "evaluation/search.py": {"search", "curve", "output_error"},
    "evaluation/next_level.py": {"search", "curve", "output_error"},
    "curves/curve.py": {"curve"},
    "statistics/bootstrap.py": {"curve", "output_error", "sensitivity"},
    "sites/find.py": {
        "model",
        "capture",
        "metrics",
        "dense",
        "evaluate",
        "search",
        "curve",
        "output_error",
        "sensitivity",
    },
    "config/grid.py": set(),
    "config/schema.py": set(),
    "cli.py": set(),
    "zoo/train.py": set(),
}


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_source_file_edited(smoke: Checkout, name: str) -> None:
    with smoke.edited(f"src/sparsity_atlas/{name}", new="\n# Edited.\n"):
        planned = smoke.plan()
    assert planned.returncode == 0, planned.text
    assert {job.split()[0] for job in planned.of(*HEAVY, "curve")} == SOURCES[name]
    # Nothing half: every job of the rule, and the tables after it.
    if SOURCES[name]:
        assert planned.of("tables")
    else:
        assert planned.jobs == set()


def test_a_criterions_file_edited(smoke: Checkout) -> None:
    with smoke.edited("src/sparsity_atlas/criteria/built_in/topk.py", new="\n# Edited.\n"):
        planned = smoke.plan()
    assert planned.of(*HEAVY, "curve") == {
        "evaluate zoo-small/topk/intermediate/0.9/eval.json",
        "evaluate zoo-small/topk/intermediate/0.5/eval.json",
        "output_error zoo-small/topk/intermediate/sparsity.parquet",
        "curve zoo-small/topk/intermediate/curve.json",
        "sensitivity zoo-small/topk/intermediate/sensitivity.parquet",
    }
    with smoke.edited("src/sparsity_atlas/criteria/built_in/topp.py", new="\n# Edited.\n"):
        planned = smoke.plan()
    assert {job.split()[0] for job in planned.of(*HEAVY)} == {"search", "output_error"}
    assert not any("topk" in job for job in planned.jobs)


@pytest.mark.parametrize("suffix", [".jsonl", ".yaml"])
def test_a_local_task_edited(smoke: Checkout, suffix: str) -> None:
    with smoke.edited(TASK + suffix, new="\n"):
        planned = smoke.plan()
    evaluations = {"dense": 1, "evaluate": 2, "search": 2}
    assert {rule: planned.counts.get(rule) for rule in evaluations} == evaluations
    assert planned.of("model", "capture", "metrics") == set()


def test_another_local_task_edited(smoke: Checkout) -> None:
    with smoke.edited("workflow/resources/tasks/cloze.jsonl", new="\n"):
        assert smoke.plan().jobs == set()


def test_a_searched_node_asked_for_after_an_edit(smoke: Checkout) -> None:
    """Snakemake has no record of the node itself; its search has one, and makes the node anew."""
    folder = "zoo-small/topp/input"
    level = searched_levels(smoke, folder)[0]
    target = f"results/{folder}/{level}/eval.json"
    assert smoke.plan(target).jobs == set()
    with smoke.edited(TASK + ".jsonl", new="\n"):
        planned = smoke.plan(target)
    assert planned.jobs == {"dense zoo-small/dense/eval.json", f"search {folder}/search.json"}


def test_the_text_edited(smoke: Checkout) -> None:
    with smoke.edited("workflow/resources/text/prose.jsonl", new="\n"):
        planned = smoke.plan()
    store = {"capture", "metrics", "output_error", "sensitivity"}
    assert planned.counts.keys() - COMMON == {*store, "model_summary"}


def test_a_metric_or_a_bar_edited(smoke: Checkout, config: dict[str, Any]) -> None:
    bars = smoke.plan(config={**config, "bars": [0.99, 0.9]})
    assert bars.of(*HEAVY) == set()
    assert len(bars.of("curve")) == 3
    config["tasks"]["few_pairs"]["metric"] = "acc_norm"
    metric = smoke.plan(config=config)
    # The dense baseline, which looks whether there is such a metric and runs no pass.
    assert metric.of("model", "capture", "metrics", "dense", "evaluate") == {
        "dense zoo-small/dense/eval.json"
    }
    assert len(metric.of("curve")) == 3


def test_what_is_no_change(smoke: Checkout) -> None:
    with (
        smoke.edited("config.yaml", new="\n# A remark.\n"),
        smoke.edited("workflow/rules/evaluate.smk", "rule dense:", "# A remark.\nrule dense:"),
        smoke.edited("profiles/default/profile.yaml", new="\nset-threads:\n  evaluate: 2\n"),
    ):
        planned = smoke.plan()
    assert planned.returncode == 0, planned.text
    assert planned.jobs == set()


def test_a_damaged_search_is_named(smoke: Checkout) -> None:
    name = "results/zoo-small/topp/input/search.json"
    with smoke.edited(name, '"levels"', "levels"):
        planned = smoke.plan()
    assert planned.returncode == 1
    assert f"error: {name}: damaged manifest" in planned.text
    assert "Traceback" not in planned.text
