"""What the rules ask of studies of answers, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkout import ROOT
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.plan.jobs import jobs
from sparsity_atlas.rules.asks import Asks
from sparsity_atlas.rules.inputs import check_inputs

TASKS = str(ROOT / "workflow/resources/tasks")


def config_of(**asked: Any) -> Config:
    """A model with a task of options and a text."""
    return parse(
        {
            "models": {"small": {"path": "small"}},
            "criteria": {"topp": {}, "teal": {}},
            "texts": {"prose": {"file": str(ROOT / "workflow/resources/text/prose.jsonl")}},
            "tasks": {
                "cloze": {"task": "atlas_cloze", "include": TASKS},
                "prose": {"task": "atlas_prose", "include": TASKS},
            },
            "run": [{"models": ["small"], "sites": ["input"], "levels": [0.5]}],
            "studies": {"truthfulness": {"tasks": ["cloze"], **asked}},
        }
    )


def test_files_settings_and_nodes() -> None:
    ask = Asks(config_of(nodes=["topp/input/0.9"], tensors=["input"], neighbours=9), "results")
    job = SimpleNamespace(model="small", task="cloze")
    assert ask.truthfulness_files() == ["results/small/truthfulness/cloze.parquet"]
    assert json.loads(ask.truthfulness) == [["small", "cloze"]]
    assert ask.truthfulness_nodes(job) == ["results/small/topp/input/0.9/eval.json"]
    study = {"metric": None, "samples": 2000, "tensors": ["input"]}
    assert json.loads(ask.answers_study(job)) == study
    assert set(json.loads(ask.answers_settings(job))["tasks"]) == {"cloze"}
    wanted = {"neighbours": 9, "replicates": 10000, "seed": 1234}
    assert json.loads(ask.truthfulness_settings(job)) == wanted


def test_a_search_that_comes_to_a_node_of_a_study_does_not_make_it_anew(tmp_path: Path) -> None:
    """Snakemake runs a job again whose set of inputs is another one than when it ran."""
    content = config_of(nodes=["topp/input/0.9"], models=["small"]).model_dump(exclude_none=True)
    content["models"]["other"] = {"path": "other"}
    content["run"] = [{"models": ["small", "other"], "sites": ["input"], "levels": "auto"}]
    config = parse(content)

    def search_of(model: str, level: str) -> list[str]:
        node = SimpleNamespace(model=model, criterion="topp", site="input", level=level)
        return Asks(config, str(tmp_path)).search_of_node(node)

    assert search_of("small", "0.9") == []
    for model in ("small", "other"):
        found = {"levels": [{"level": "0.9"}, {"level": "0.95"}]}
        write_manifest(tmp_path / model / "topp/input/search.json", found)
    assert search_of("small", "0.9") == []
    # Those that only the search has made, and the other model's, which no study asks for.
    assert search_of("small", "0.95") == ["results/small/topp/input/search.json"]
    assert search_of("other", "0.9") == ["results/other/topp/input/search.json"]
    # Deleted, they are missing to the curve all the same.
    assert "results/small/topp/input/0.9/eval.json" in Asks(config, str(tmp_path)).lost_nodes()


def test_the_plan_knows_these_jobs(tmp_path: Path) -> None:
    config = config_of(nodes=["topp/input/0.9", "topp/input/0.5"])
    found = [job for job in jobs(config, tmp_path) if job.rule in ("answers", "truthfulness")]
    assert [(job.rule, job.model, job.task, job.done) for job in found] == [
        ("answers", "small", "cloze", False),
        ("truthfulness", "small", "cloze", False),
    ]
    # Of the nodes the one that no block lists, with all tasks of its curve.
    nodes = [job for job in jobs(config, tmp_path) if job.rule == "evaluate"]
    assert [set(job.evaluations) for job in nodes] == [{"cloze", "prose"}] * 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"tasks": ["prose"]},
            "studies.truthfulness.tasks: 'prose' asks for loglikelihood_rolling, in which a model "
            "gives no answer of its own; expected multiple_choice or generate_until",
        ),
        ({"nodes": ["topp/input/1.5"]}, "nodes: topp/input/1.5: the level is out of range"),
        ({"nodes": ["teal/input/0.5"]}, "nodes: teal/input/0.5: 'teal' is calibrated; say on how"),
    ],
)
def test_refused_before_anything_runs(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        check_inputs(config_of(**asked))


def test_a_model_that_fills_masks_in_is_refused() -> None:
    config = config_of()
    entry = config.models["small"].model_copy(update={"diffusion": object()})
    with pytest.raises(
        AtlasError, match="models: 'small' fills masks in, and its tokens see those"
    ):
        check_inputs(config.model_copy(update={"models": {"small": entry}}))
