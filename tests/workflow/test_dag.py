"""Which jobs a configuration asks for, and which configurations and targets are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.utils import update_config

from checkout import ROOT, ZOO, Checkout, Planned
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.rules.asks import Asks
from sparsity_atlas.rules.inputs import check_inputs


def counts(planned: Planned) -> dict[str, int]:
    """Jobs by rule, without the figures and the report."""
    assert planned.returncode == 0, planned.text
    return {rule: n for rule, n in planned.counts.items() if rule not in ("figures", "page")}


def test_smoke_grid(empty: Checkout) -> None:
    # Three curves of one model: two searched for, one with two levels and layers one at a time.
    assert counts(empty.plan()) == {
        **{"all": 1, "run_config": 1, "model": 1, "dense": 1, "model_summary": 1, "tables": 1},
        **{"capture": 2, "metrics": 2, "output_error": 3, "curve": 3, "search": 2, "evaluate": 2},
        "sensitivity": 1,
    }


def test_default_grid(empty: Checkout) -> None:
    # 4 models × 2 sites, a mixture of experts and a masked-diffusion model at one, 3 more sites of one model,
    # and 2 more criteria at one of its sites; of that model the layers of 2 sites one at a time.
    assert counts(empty.plan("--configfile", "config.yaml")) == {
        **{"all": 1, "run_config": 1, "model": 6, "dense": 6, "model_summary": 6, "tables": 1},
        **{"capture": 13, "metrics": 13, "output_error": 15, "curve": 15, "search": 15},
        "sensitivity": 2,
    }


def test_paper_grid(empty: Checkout) -> None:
    # 13 models × 5 sites × 26 levels of one criterion; nothing of the default comes along.
    assert counts(empty.plan("--configfile", "workflow/config/paper.yaml")) == {
        **{"all": 1, "run_config": 1, "model": 13, "dense": 13, "model_summary": 13, "tables": 1},
        **{"capture": 65, "metrics": 65, "output_error": 65, "curve": 65, "evaluate": 1690},
    }


def test_answers_are_captured_once_and_compared_with_the_nodes(empty: Checkout) -> None:
    # 3 models × 2 tasks that are scored and 3 × 1 that is written; their nodes are those of the curves.
    assert counts(empty.plan("--configfile", "workflow/config/truthfulness.yaml")) == {
        **{"all": 1, "run_config": 1, "model": 6, "dense": 6, "model_summary": 6, "tables": 1},
        **dict.fromkeys(("capture", "metrics", "output_error", "curve", "evaluate"), 6 * 2),
        **dict.fromkeys(("answers", "truthfulness"), 3 * 2 + 3),
    }


FIVE = ("intermediate", "input", "gate", "up", "all_inputs")
NINE = ("arc_easy", "arc_challenge", "boolq", "winogrande", "piqa", "sciq", "lambada")
NINE += ("hellaswag", "triviaqa")
# Of the paper's other parts: models, sites, levels and tasks.
PARTS = {
    "reasoning": (
        {"Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"},
        *(FIVE, ("1", "0.99", "0.95", "0.9")),
        ("mmlu_redux", "triviaqa", "truthfulqa_gen", "gsm8k"),
    ),
    "moe": (
        {"allenai/OLMoE-1B-7B-0125", "Qwen/Qwen3-30B-A3B"},
        *(FIVE, ("1", "0.99", "0.98", "0.97", "0.95", "0.92", "0.9", "0.75", "0.5")),
        NINE,
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_grid_of_a_part_of_the_paper(
    empty: Checkout, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Exactly the paper's models, sites and levels."""
    hub, sites, levels, tasks = PARTS[part]
    name = f"workflow/config/paper_{part}.yaml"
    count = 2 * len(sites)
    assert counts(empty.plan("--configfile", name)) == {
        **{"all": 1, "run_config": 1, "model": 2, "dense": 2, "model_summary": 2, "tables": 1},
        **dict.fromkeys(("capture", "metrics", "output_error", "curve"), count),
        "evaluate": count * len(levels),
    }
    monkeypatch.chdir(empty.path)
    merged = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
    update_config(merged, yaml.safe_load(Path(name).read_text(encoding="utf-8")))
    config = parse(merged)
    curves = grid.curves(config)
    assert {config.models[curve.model].hub for curve in curves} == hub
    assert {curve.tasks for curve in curves} == {tasks}
    for model in grid.models(config):
        own = [curve for curve in curves if curve.model == model]
        assert tuple(curve.site for curve in own) == sites
        assert {(curve.criterion, curve.levels, curve.auto) for curve in own} == {
            ("topp", levels, False)
        }
    budget = {"reasoning": 4096, "moe": 128}[part]
    written = {"mmlu_redux", "triviaqa", "truthfulqa_gen", "gsm8k"}
    for task in tasks:
        assert config.tasks[task].max_gen_toks == (budget if task in written else None)


# Of the paper's masked-diffusion model: each task's levels at `intermediate` and at `all_inputs`, and its
# guidance.
LLADA = {
    "humaneval": ("0.6", "0.6", 0.0),
    "mbpp": ("0.775", "0.775", 0.0),
    "mmlu": ("0.8", "0.8", 0.0),
    "winogrande": ("0.8", "0.8", 0.0),
    "ceval": ("0.85", "0.85", 0.0),
    "cmmlu": ("0.8", "0.75", 0.0),
    "arc_challenge": ("0.9", "0.9", 0.5),
    "piqa": ("0.6", "0.6", 0.5),
    "hellaswag": ("0.85", "0.85", 0.5),
    "gpqa": ("0.9", "0.9", 0.5),
}


def test_the_grid_of_the_paper_s_diffusion_model(
    empty: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "workflow/config/paper_diffusion.yaml"
    assert counts(empty.plan("--configfile", name)) == {
        **{"all": 1, "run_config": 1, "model": 2, "dense": 2, "model_summary": 2, "tables": 1},
        **dict.fromkeys(("capture", "metrics"), 4),
        **dict.fromkeys(("output_error", "curve", "evaluate"), 15),
    }
    monkeypatch.chdir(empty.path)
    merged = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
    update_config(merged, yaml.safe_load(Path(name).read_text(encoding="utf-8")))
    config = parse(merged)
    found: dict[str, dict[str, Any]] = {}
    for curve in grid.curves(config):
        entry = config.models[curve.model]
        assert entry.hub == "GSAI-ML/LLaDA-8B-Base"
        assert config.criteria[curve.criterion].rule == "topp"
        (level,) = curve.levels
        for task in curve.tasks:
            own = found.setdefault(task, {"guidance": entry.diffusion.guidance})
            assert own["guidance"] == entry.diffusion.guidance
            assert curve.site not in own
            own[curve.site] = level
    assert {
        task: (own["intermediate"], own["all_inputs"], own["guidance"])
        for task, own in found.items()
    } == LLADA
    for task in LLADA:
        written = task in ("humaneval", "mbpp")
        assert config.tasks[task].max_gen_toks == (1024 if written else None)


@pytest.mark.parametrize("source", ["files", "hub"])
def test_the_grid_of_a_real_model(
    empty: Checkout, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """A GGUF file at all sites by eight rules; the same from the Hub, with nothing of the files left."""
    names = ["workflow/config/real.yaml", "workflow/config/real_hub.yaml"]
    used = names if source == "hub" else names[:1]
    # Searched: 2 criteria at 8 sites, 2 at 6, 2 at 1 and 2 at another; with the chat template 1 at 5; in
    # float32 1 at 4; of three zoo models 1 at 8. Listed: 11 single layers, masks of prompts at 2 levels, and
    # 2 nodes of the study of right answers. Calibrated: one of those at 6 sites, and four at one.
    assert counts(empty.plan("--configfile", *used)) == {
        **{"all": 1, "run_config": 1, "model": 6, "dense": 6, "model_summary": 6, "tables": 1},
        **{"capture": 41, "metrics": 41, "calibrate": 10, "evaluate": 15, "sensitivity": 6},
        **{"answers": 2, "truthfulness": 2, "search": 65},
        **dict.fromkeys(("output_error", "curve"), 65 + 11 + 1),
    }
    monkeypatch.chdir(empty.path)
    merged = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
    for name in used:
        update_config(merged, yaml.safe_load(Path(name).read_text(encoding="utf-8")))
    config = parse(merged)
    for model in grid.models(config):
        named = json.loads(grid.fetch_slice(config, model))
        assert {key for key in named if key in ("path", "gguf", "hub")} == (
            {"path"}
            if model.startswith("zoo")
            else {"hub"}
            if source == "hub"
            else {"path", "gguf"}
        )
        tasks = json.loads(grid.evaluation_slice(config, model, tuple(config.tasks)))["tasks"]
        of_files = {
            name for name, task in tasks.items() if "data/" in json.dumps(task.get("override", {}))
        }
        assert of_files == (set() if source == "hub" else {"arc_easy", "sciq", "lambada_openai"})


def test_criteria_grid(empty: Checkout) -> None:
    # 4 models at 5 sites of the FFN: 15 + 13 + 8 + 5 + 4 criteria, 4 + 6 + 5 + 3 + 2 of them calibrated;
    # and at 3 of attention: 7 + 7 + 10, of these 3 + 3 + 7; by projection 3, of these 2. Layers one at a
    # time: 2 criteria at 3 sites.
    found = counts(empty.plan("--configfile", "workflow/config/criteria.yaml"))
    assert found == {
        **{"all": 1, "run_config": 1, "model": 4, "dense": 4, "model_summary": 4, "tables": 1},
        **{"capture": 32, "metrics": 32, "calibrate": 140, "search": 288, "evaluate": 492},
        **{"output_error": 288, "curve": 288, "sensitivity": 24},
    }


def test_criteria_by_accuracy_grid(empty: Checkout) -> None:
    # At 8 sites 8 + 6 + 5 + 3 + 3 criteria of the FFN's and 3 + 3 + 4 of attention's, 3 or 4 levels each.
    found = counts(empty.plan("--configfile", "workflow/config/criteria_accuracy.yaml"))
    assert found == {
        **{"all": 1, "run_config": 1, "model": 4, "dense": 4, "model_summary": 4, "tables": 1},
        **{"capture": 32, "metrics": 32, "calibrate": 64, "evaluate": 548},
        **{"output_error": 140, "curve": 140},
    }


def test_denoising_grid(empty: Checkout) -> None:
    # 8 sites of one model at a level of one criterion, one of them at one of another, too.
    found = counts(empty.plan("--configfile", "workflow/config/denoising.yaml"))
    assert found == {
        **{"all": 1, "run_config": 1, "model": 1, "dense": 1, "model_summary": 1, "tables": 1},
        **{"capture": 8, "metrics": 8, "evaluate": 9, "output_error": 9, "curve": 9},
    }


def test_a_calibrated_node_by_its_path(empty: Checkout, config: dict[str, Any]) -> None:
    config["criteria"] = {"teal": {}}
    config["calibration"] = {"tokens": 256}
    planned = empty.plan("results/zoo-small/teal/input/0.5/eval.json", config=config)
    assert planned.jobs == {
        "model zoo-small/model.json",
        "capture zoo-small/capture/input.json",
        "calibrate zoo-small/teal/input/calibration.safetensors",
        "evaluate zoo-small/teal/input/0.5/eval.json",
    }


def test_exports_of_what_is_calibrated(empty: Checkout, config: dict[str, Any]) -> None:
    config["criteria"] = {"teal": {}}
    config["calibration"] = {"tokens": 256}
    config["run"][1] |= {"criteria": ["topk", "teal"]}
    planned = empty.plan("export", config=config)
    assert planned.of("export_curve") == {
        "export_curve zoo-small/teal/intermediate/thresholds.json"
    }
    assert planned.counts == {
        "model": 1,
        "capture": 1,
        "calibrate": 1,
        "export_curve": 1,
        "export": 1,
    }


def test_one_node_by_its_path(empty: Checkout) -> None:
    planned = empty.plan("results/zoo-small/topk/intermediate/0.9/eval.json")
    assert planned.jobs == {
        "model zoo-small/model.json",
        "evaluate zoo-small/topk/intermediate/0.9/eval.json",
    }


@pytest.mark.parametrize(
    "path",
    [
        "zoo-small/topk/intermediate/0.123",  # a level that no block names
        "zoo-small/topp/gate/0.9",  # a site that no block names
        "zoo-small/maxp/input/0.01",  # a criterion of the catalogue that no block names
        "zoo-large/topp/input/1",  # a model of the catalogue that no block names
    ],
)
def test_a_node_that_no_block_names(empty: Checkout, path: str) -> None:
    planned = empty.plan(f"results/{path}/eval.json")
    assert planned.returncode == 0, planned.text
    assert planned.of("evaluate") == {f"evaluate {path}/eval.json"}
    assert planned.counts == {"evaluate": 1, "model": 1}


def tell_tokens(checkout: Checkout) -> None:
    """A checkout has the smallest model alone: of the checkpoints it needs what they say of their tokens."""
    for record in (ROOT / ZOO / "tiny").glob("*/training.json"):
        copy = checkout.path / ZOO / "tiny" / record.parent.name / record.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(record.read_bytes())


def test_grid_of_a_training(empty: Checkout) -> None:
    # Four checkpoints of one training, at one site under one criterion that is calibrated.
    tell_tokens(empty)
    four = ("model", "dense", "model_summary", "capture", "metrics", "calibrate", "search")
    assert counts(empty.plan("--configfile", "workflow/config/training.yaml")) == {
        **dict.fromkeys(("all", "run_config", "tables"), 1),
        **dict.fromkeys((*four, "output_error", "curve"), 4),
    }


# Of each configuration of a study: models, captures, curves, searched ones, listed nodes.
STUDIES = {
    # Three of the models have no gate.
    "activations": (7, 11, 11, 7, 4),
    # What runs one threshold, a prompt's masks and the same without them; calibrated: cett and tda.
    "pitfalls": (2, 6, 16, 0, 48),
    # ARM in the first layer alone, with two seeds.
    "meaningless": (2, 2, 6, 0, 22),
    # The diffusion twin has no pairs, but as many sites as the others; the checkpoints one.
    "zoo": (10, 34, 100, 94, 19),
}


@pytest.mark.parametrize("name", STUDIES)
def test_grids_of_the_studies(empty: Checkout, name: str) -> None:
    tell_tokens(empty)
    models, captures, curves, searched, nodes = STUDIES[name]
    found = counts(empty.plan("--configfile", f"workflow/config/{name}.yaml"))
    assert found["model"] == found["dense"] == found["model_summary"] == models
    assert found["capture"] == found["metrics"] == captures
    assert found["curve"] == found["output_error"] == curves
    assert found.get("search", 0) == searched
    assert found.get("evaluate", 0) == nodes
    assert found.get("calibrate", 0) == (4 if name == "pitfalls" else 0)


def test_revisions_are_planned_and_refused_as_models(
    empty: Checkout, config: dict[str, Any]
) -> None:
    entry = {"hub": "a/b", "tokens_per_step": 512, "revisions": ["step1", "step2"]}
    block = {"models": ["fam"], "criteria": ["topk"], "sites": ["intermediate"], "levels": [0.9]}
    content = {**config, "run": [block]}
    planned = empty.plan(config={**content, "models": {"fam": entry}})
    assert planned.returncode == 0, planned.text
    assert planned.of("evaluate") == {
        f"evaluate fam-step{step}/topk/intermediate/0.9/eval.json" for step in (1, 2)
    }
    assert planned.counts["model"] == planned.counts["dense"] == 2
    del entry["tokens_per_step"]
    refused = empty.plan(config={**content, "models": {"fam": entry}})
    assert refused.returncode != 0
    assert "models.fam-step1: training tokens: not known" in refused.text
    assert "Traceback" not in refused.text


def test_parts_of_a_layer_have_nodes_of_their_own(empty: Checkout, config: dict[str, Any]) -> None:
    """And none else: what is captured is of all parts, once."""
    before = empty.plan(config=config)
    block = {"models": ["zoo-small"], "criteria": ["topk"], "sites": ["intermediate"]}
    # The tasks of the others: one with a loss would have a figure of its own.
    block |= {"parts": ["ffn"], "levels": [0.9], "tasks": ["few_pairs"]}
    config["run"].append({**block, "sensitivity": [0.9]})
    after = empty.plan(config=config)
    assert after.returncode == 0, after.text
    folder = "zoo-small/topk/intermediate@ffn"
    new = after.jobs - before.jobs
    assert {job for job in new if folder in job} == new
    assert after.of("evaluate") - before.of("evaluate") == {f"evaluate {folder}/0.9/eval.json"}
    assert after.of("sensitivity") - before.of("sensitivity") == {
        f"sensitivity {folder}/sensitivity.parquet"
    }
    assert after.of("capture", "metrics") == before.of("capture", "metrics")
    # All parts that there may be are the plain site, whatever their order.
    config["run"][-1] |= {"parts": ["experts", "ffn", "shared"]}
    assert not [job for job in empty.plan(config=config).jobs if "@" in job]


@pytest.mark.parametrize(
    ("site", "there"),
    [
        ("intermediate@ffn", True),
        ("all_inputs@shared+experts", True),
        ("intermediate@experts+shared", False),  # not in their order
        ("intermediate@ffn+shared+experts", False),  # all of them
        ("intermediate@attention", False),
        ("qkv_input@experts", False),
        ("intermediate@", False),
    ],
)
def test_a_site_in_parts_of_a_layer_by_its_path(empty: Checkout, site: str, there: bool) -> None:
    planned = empty.plan(f"results/zoo-small/topk/{site}/0.9/eval.json")
    expected = {"evaluate": 1, "model": 1} if there else {}
    assert planned.counts == expected
    assert (planned.returncode == 0) == there


@pytest.mark.parametrize(
    "path",
    [
        "zoo-small/capture/intermediate@ffn.json",
        "zoo-small/metrics/intermediate@ffn.parquet",
        "zoo-small/topk/intermediate/0.90/eval.json",  # not as levels are spelled in paths
        "zoo-small/topk/intermediate/1.0/eval.json",
        "zoo-small/topk/intermediate/-1/eval.json",
        "zoo-small/topk/intermediate/p/eval.json",
        "zoo-small/topk/middle/0.9/eval.json",
        "zoo-small/bottomk/intermediate/0.9/eval.json",
        "zoo-tiny/topk/intermediate/0.9/eval.json",
        "zoo-small/x/topk/intermediate/0.9/eval.json",
    ],
)
def test_paths_that_name_nothing(empty: Checkout, path: str) -> None:
    planned = empty.plan(f"results/{path}")
    assert planned.returncode != 0
    assert not planned.jobs
    assert "Traceback" not in planned.text


def test_one_model(empty: Checkout) -> None:
    planned = empty.plan("results/zoo-small/summary.csv", "--configfile", "config.yaml")
    assert planned.counts == {
        **{"model": 1, "dense": 1, "model_summary": 1},
        **{"capture": 2, "metrics": 2, "output_error": 2, "curve": 2, "search": 2},
    }


def test_the_plan_runs_nothing_else(empty: Checkout) -> None:
    planned = empty.plan("plan")
    assert planned.returncode == 0, planned.text
    assert planned.counts == {"plan": 1}


def test_overlapping_blocks_are_one_grid(empty: Checkout, config: dict[str, Any]) -> None:
    once = counts(empty.plan(config=config))
    config["run"] += [{**config["run"][1], "levels": ["0.90", 0.7]}]
    assert counts(empty.plan(config=config)) == {**once, "evaluate": once["evaluate"] + 1}


def _mistakes() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Changes of the smoke configuration, and what their message must name."""
    block = {"models": ["zoo-small"], "criteria": ["topk"], "sites": ["intermediate"]}
    return {
        "unknown key": ({"repicates": 10}, ["repicates", "unknown key"]),
        "unknown model": ({"run": [{**block, "models": ["nobody"]}]}, ["models", "nobody"]),
        "unknown criterion": ({"run": [{**block, "criteria": ["topq"]}]}, ["criteria", "topq"]),
        "unknown rule": ({"criteria": {"topk": {"rule": "topq"}}}, ["topq"]),
        "unknown site": ({"run": [{**block, "sites": ["middle"]}]}, ["sites", "middle"]),
        "unknown part": (
            {"run": [{**block, "parts": ["router"]}]},
            ["run.0.parts.0", "'ffn', 'shared' or 'experts'", "router"],
        ),
        "parts of attention": (
            {"run": [{**block, "sites": ["o_input"], "parts": ["experts"]}]},
            ["run: parts", "'o_input'", "attention", "intermediate"],
        ),
        "unknown task": ({"run": [{**block, "tasks": ["sums"]}]}, ["tasks", "sums"]),
        "level out of range": ({"run": [{**block, "levels": [1.5]}]}, ["levels", "1.5", "topk"]),
        "level twice": ({"run": [{**block, "levels": [0.9, "0.90"]}]}, ["levels", "twice", "0.9"]),
        "no levels": ({"run": [{**block, "levels": []}]}, ["levels", "empty"]),
        "text file missing": ({"texts": {"prose": {"file": "no.txt"}}}, ["prose", "no.txt"]),
        "include folder missing": (
            {"tasks": {"few_pairs": {"include": "no/folder"}}},
            ["few_pairs", "no/folder"],
        ),
        "task file that is not YAML": (
            {"tasks": {"few_pairs": {"include": "broken_tasks"}}},
            ["broken_tasks"],
        ),
        "calibrated without a text": (
            {"criteria": {"teal": None}, "run": [{**block, "criteria": ["teal"]}]},
            ["teal", "calibrated", "calibration: {tokens"],
        ),
        "criterion file missing": ({"criteria": {"mine": {"file": "no.py"}}}, ["no.py"]),
    }


def spoil(config: dict[str, Any], mistake: str, folder: Path) -> list[str]:
    """Make a mistake in the smoke configuration, and a broken task; what its message must name."""
    changes, named = _mistakes()[mistake]
    broken = folder / "broken_tasks" / "broken.yaml"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text("task: [unclosed\n")
    for key, value in changes.items():
        if key == "tasks":
            config[key]["few_pairs"].update(value["few_pairs"])
        else:
            config[key] = value
    if "mine" in config.get("criteria", {}):
        config["run"][1]["criteria"] = ["mine"]
    return named


def read(content: dict[str, Any]) -> None:
    """Read a configuration as `workflow/rules/common.smk` does."""
    config = parse(content)
    check_inputs(config)
    Asks(config, "results")


@pytest.mark.parametrize("mistake", list(_mistakes()))
def test_mistakes_are_named(
    empty: Checkout, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """In `config.yaml` and this one, which Snakemake merges."""
    named = spoil(config, mistake, empty.path)
    monkeypatch.chdir(empty.path)
    merged = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
    update_config(merged, config)
    with pytest.raises(AtlasError) as caught:
        read(merged)
    assert all(word in str(caught.value) for word in named)


# What each of the two calls finds first and last.
@pytest.mark.parametrize(
    "mistake", ["unknown key", "level twice", "text file missing", "criterion file missing"]
)
def test_mistakes_end_in_one_line(empty: Checkout, config: dict[str, Any], mistake: str) -> None:
    named = spoil(config, mistake, empty.path)
    planned = empty.plan(config=config)
    assert planned.returncode == 1
    # Snakemake's own lines say which profile and configuration files it reads.
    said = [
        line for line in planned.text.splitlines() if not line.startswith(("Using ", "Config "))
    ]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert all(word in said[0] for word in named)


def test_braces_in_the_text_of_a_task_are_no_wildcards(
    empty: Checkout, config: dict[str, Any]
) -> None:
    config["tasks"]["few_pairs"]["override"] = {"doc_to_text": "{{text}}"}
    assert counts(empty.plan(config=config))["search"] == 2
