"""What a run expects of its jobs before any has ended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.plan.corrections import Seconds
from sparsity_atlas.plan.expected_seconds import (
    FILE,
    GGUF_LOADING,
    LOADING,
    expected,
    key_of,
    save,
)
from sparsity_atlas.plan.jobs import UNKNOWN, Amount, jobs
from sparsity_atlas.plan.schedule import Key


def config_of(folder: Path, **changes: Any) -> Config:
    """Two models, the second with four times the bytes."""
    for name, size in (("small", 1000), ("large", 4000)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(bytes(size))
    return parse(
        {
            "models": {name: {"path": str(folder / name)} for name in ("small", "large")},
            "criteria": {"topp": {}},
            "texts": {"prose": {"file": "prose.jsonl"}},
            "tasks": {"pairs": {}},
            "run": [{"models": ["small", "large"], "sites": ["input"]}],
            **changes,
        }
    )


def totals(config: Config, results: Path) -> dict[Key, float]:
    """Seconds of whole jobs."""
    return {key: seconds.total for key, seconds in expected(config, results)}


def test_searches_are_long_and_those_of_large_models_longer(tmp_path: Path) -> None:
    config = config_of(tmp_path, tasks={"pairs": {}, "prose": {}, "cloze": {}})
    found = totals(config, tmp_path / "results")
    small, large = (found[Key("search", model, "topp", "input")] for model in ("small", "large"))
    assert small > 2 * found[Key("dense", "small")] > 2 * found[Key("model", "small")]
    assert large > 1.5 * small
    assert found[Key("page")] > 0


def test_a_gguf_file_is_as_large_as_it_is(tmp_path: Path) -> None:
    """Its searches were expected to be as long as the mean of all; its numbers take time to be worked out."""
    search = Key("search", "large", "topp", "input")
    config = config_of(tmp_path)
    (tmp_path / "one.gguf").write_bytes(bytes(4000))
    entries = {
        "small": {"path": str(tmp_path / "small")},
        "large": {"gguf": str(tmp_path / "one.gguf")},
    }
    plain = dict(expected(config, tmp_path))[search]
    packed = dict(expected(config_of(tmp_path, models=entries), tmp_path))[search]
    assert packed.work == plain.work
    assert packed.start - plain.start == pytest.approx(4000 * (GGUF_LOADING - LOADING))
    (tmp_path / "large" / "model.safetensors").unlink()
    (tmp_path / "large" / "one.gguf").write_bytes(bytes(4000))
    entries["large"] = {"path": str(tmp_path / "large"), "gguf": "one.gguf"}
    inside = parse({**config.model_dump(mode="json", exclude_unset=True), "models": entries})
    assert dict(expected(inside, tmp_path))[search] == packed


def test_more_tasks_tensors_predictors_and_curves_take_longer(tmp_path: Path) -> None:
    one = totals(config_of(tmp_path), tmp_path / "results")
    asked = {
        "tasks": {"pairs": {}, "prose": {}, "cloze": {}},
        "studies": {"predictors": [4, 16, 64]},
    }
    models = ["small", "large"]
    run = [
        {"models": models, "sites": ["input", "all_inputs", "gate"]},
        {"models": models, "sites": ["gate"], "layers": [[1]], "levels": [0.5]},
    ]
    many = totals(config_of(tmp_path, **asked, run=run), tmp_path / "results")
    search = Key("search", "large", "topp", "input")
    assert many[search] > 1.3 * one[search]
    assert many[Key("tables")] > 1.1 * one[Key("tables")]
    errors = [many[Key("output_error", "large", "topp", site)] for site in ("gate", "input")]
    confined = many[Key("output_error", "large", "topp", "gate@layers1")]
    assert errors[0] > 1.5 * errors[1] > 1.5 * confined
    found = dict(expected(config_of(tmp_path, **asked, run=run), tmp_path / "results"))
    both, single = (found[Key("metrics", "large", site=site)] for site in ("all_inputs", "input"))
    assert both.work == pytest.approx(2 * single.work)


def test_what_is_done_is_not_expected(tmp_path: Path) -> None:
    results = tmp_path / "results"
    config = config_of(tmp_path)
    write_manifest(results / "small" / "model.json", {})
    assert Key("model", "small") not in dict(expected(config, results))


def test_what_plan_has_said_goes_first(tmp_path: Path) -> None:
    config, results = config_of(tmp_path), tmp_path / "results"
    (results / "logs").mkdir(parents=True)
    every = jobs(config, results)
    curve = Key("search", "large", "topp", "input")
    before = totals(config, results)
    said = {key_of(job): Amount(600.0, 900.0) for job in every if job.rule == "search"}
    said[Key("dense", "small")] = UNKNOWN
    seconds = [said.get(key_of(job), Amount.exactly(30.0)) for job in every]
    save(results, config, every, seconds, [7.0] * len(every))
    found = totals(config, results)
    assert dict(expected(config, results))[curve] == Seconds(7.0, 593.0)
    assert found[Key("model", "small")] == 30.0
    # What plan did not know is as much longer than usual as the job of its rule that it knew.
    ratio = found[Key("dense", "large")] / before[Key("dense", "large")]
    assert found[Key("dense", "small")] == pytest.approx(ratio * before[Key("dense", "small")])


def test_a_forecast_of_another_configuration_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    config, results = config_of(tmp_path), tmp_path / "results"
    (results / "logs").mkdir(parents=True)
    every = jobs(config, results)
    usual = expected(config, results)
    save(results, config, every, [Amount.exactly(600.0)] * len(every), [math.inf] * len(every))
    assert expected(config_of(tmp_path, seed=5), results) == usual
    content = read_manifest(results / FILE)
    for one in content["jobs"]:
        one["seconds"] = one.pop("start") + one.pop("work")
    write_manifest(results / FILE, content)  # as an earlier release had it
    assert expected(config, results) == usual
    (results / FILE).write_text("{", encoding="utf-8")
    assert expected(config, results) == usual


def test_tasks_go_by_the_bytes_of_what_is_evaluated_of_their_files(tmp_path: Path) -> None:
    """Levels of five real data sets took ten seconds where as many of the zoo's tasks take 1.6."""
    line = json.dumps({"text": "a" * 987}) + "\n"
    assert len(line) == 1000
    (tmp_path / "all.jsonl").write_text(line * 900, encoding="utf-8")

    def task(**options: Any) -> dict[str, Any]:
        files = {"data_files": {"test": str(tmp_path / "all.jsonl")}}
        return {"override": {"dataset_path": "json", "dataset_kwargs": files}, **options}

    def work(tasks: dict[str, Any]) -> float:
        found = dict(expected(config_of(tmp_path, tasks=tasks), tmp_path / "results"))
        return found[Key("search", "small", "topp", "input")].work

    names = ("one", "two", "three")
    usual = work({name: {} for name in names})  # of the Hub
    assert work({name: task(limit=30) for name in names}) == pytest.approx(usual)  # 90 kB in all
    assert work({name: task(limit=300) for name in names}) == pytest.approx(5.5 * usual)
    assert work({name: task() for name in names}) == work(
        {name: task(limit=9000) for name in names}
    )
    assert work({"one": task(limit=30)}) < 0.5 * usual
