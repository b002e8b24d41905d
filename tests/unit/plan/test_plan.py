"""The forecast against what really happens, on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from transformers import AutoModelForMultimodalLM

from checkout import Checkout
from mixtures import save_mixture, wide_mixture
from small_configs import small_config
from sparsity_atlas.activations import capture
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, StudySettings, parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.figures.wanted import wanted
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.lm.journalled import shortest
from sparsity_atlas.loading.layouts import auto_class
from sparsity_atlas.plan import rates
from sparsity_atlas.plan.captured_passes import passes_of_a_level, passes_of_reuse
from sparsity_atlas.plan.cost import go_offline_if_unreachable
from sparsity_atlas.plan.dry_run import Batch, TaskCost
from sparsity_atlas.plan.forecast import (
    TABLES_OF_A_CURVE,
    Forecast,
    Start,
    evaluation_seconds,
    forecast,
    truthfulness_seconds,
)
from sparsity_atlas.plan.jobs import UNKNOWN, Amount, Job, jobs
from sparsity_atlas.plan.model_facts import Outlook, Unknowns, captured_tokens, look, measure
from sparsity_atlas.plan.rates import dimension_seconds, figure_seconds, importing
from sparsity_atlas.plan.text import duration, show, size, text
from sparsity_atlas.report.report import MODEL_FIGURES
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.speed.decoder import STEPS
from sparsity_atlas.tasks.load import load_tasks
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    MAX_LENGTH,
    ROLLING,
    choice_documents,
    letter_documents,
    open_session,
    rolling_documents,
    save_model,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)

SHOTS = {
    **CHOICE,
    "fewshot_split": "test",
    "num_fewshot": 2,
    "fewshot_config": {"sampler": "first_n"},
}
TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "choice": (CHOICE, choice_documents()),
    "letters": (CHOICE, letter_documents()),
    "shots": (SHOTS, choice_documents()),
    "rolling": (ROLLING, rolling_documents()),
    "last_word": (LAST_WORD, rolling_documents()),
    "generation": (GENERATION, rolling_documents()),
}


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a job's imports take seconds is measured where the stage is run, and not in each forecast."""
    monkeypatch.setattr("sparsity_atlas.plan.rates.import_seconds", lambda modules: 5.0)


def make_config(models: dict[str, Any], tasks: dict[str, Any], **other: Any) -> Config:
    """A configuration with one block over all of these."""
    block = {"models": list(models), **other.pop("block", {})}
    return parse(
        {
            "device": "cpu",
            "models": models,
            "criteria": {"topp": {}, "topk": {}},
            "texts": {"prose": {"file": "text.txt"}},
            "tasks": tasks,
            "run": [block],
            **other,
        }
    )


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "plain": ({}, {}, None),
    "chat-bos": ({"bos": True, "chat": True}, {"apply_chat_template": True}, 4),
    "bos-short": ({}, {"add_bos_token": True, "max_length": 20, "batch_size": 3}, 5),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any], int | None]:
    """A model's manifest and folder, its settings, and a limit for the tasks."""
    made, entry, limit = VARIANTS[request.param]
    folder = save_model(tmp_path_factory.mktemp(request.param) / "tiny", **made)
    return write_model_manifest(folder, folder.parent / "model.json"), folder, entry, limit


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_those_of_the_evaluation(
    task: str, variant: tuple[Path, Path, dict[str, Any], int | None], tmp_path: Path
) -> None:
    manifest, folder, entry, limit = variant
    config_, documents = TASKS[task]
    task_entry = write_task(tmp_path / "tasks", task, documents, **config_)
    if limit is not None:
        task_entry["limit"] = limit
    config = make_config({"tiny": {"path": str(folder), **entry}}, {task: task_entry})
    unknowns = Unknowns()
    tasks = load_tasks({task: task_entry}, config.seed)
    outlook = look(config, "tiny", tasks, tmp_path / "none.json", unknowns)
    assert not unknowns

    settings = json.loads(grid.evaluation_slice(config, "tiny", (task,)))
    session = open_session(manifest, settings.pop("tasks"), **settings)
    real = evaluate_node(session, None, tmp_path / "dense")["tasks"][task]

    cost = outlook.costs[task]
    assert cost.documents == real["items"] == (limit or len(documents))
    assert cost.requests == real["tokens"]["scoring"] + real["tokens"]["prompt"]
    if task == "generation":
        # Of the 12 tokens that it may generate, the last is not fed back.
        assert real["tokens"]["generation"] <= cost.generation == 11 * cost.documents
    else:
        assert cost.generation == real["tokens"]["generation"] == 0
    assert cost.sample.positions <= cost.positions


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3"])
def test_a_mixture_is_planned_by_what_a_token_meets(family: str, tmp_path: Path) -> None:
    """Entries of K experts, and of what stands beside them, from a manifest as from the model itself."""
    model = wide_mixture(family, vocab_size=300)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    manifest = write_model_manifest(tmp_path / "model", tmp_path / "model.json")
    config = make_config({"m": {"path": str(tmp_path / "model")}}, {}, block={"levels": [0.5]})
    known, unseen = (
        look(config, "m", {}, path, Unknowns()) for path in (manifest, tmp_path / "none.json")
    )
    assert unseen.parameters == known.parameters == model.num_parameters()
    assert not unseen.shapes
    assert unseen.active is None
    measure(config, "m", unseen, {})
    assert known.active == unseen.active == read_manifest(manifest)["parameters"]["active"]
    assert known.layers == unseen.layers == 3
    each = {"experts": 2 * 64, "shared": 64 if family == "deepseek_v3" else 128, "ffn": 128}
    beside = [part for part in find_parts(model) if part.name != "attention"]
    for found in (known, unseen):
        assert [one["intermediate"] for one in found.shapes] == [each[one.name] for one in beside]
        assert [one["input"] for one in found.shapes] == [128] * len(beside)
        weights = sum(3 * 128 * each[one.name] for one in beside)
        assert found.ffn_share == weights / found.active


def test_a_model_for_more_than_text_is_planned_by_its_decoder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = small_config("llava", vocab_size=300)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    path = write_model_manifest(folder, tmp_path / "model.json")
    asked = make_config({"m": {"path": str(folder)}}, {}, block={"levels": [0.5]})
    known, unseen = (
        look(asked, "m", {}, one, Unknowns()) for one in (path, tmp_path / "none.json")
    )
    assert known.loaded == unseen.loaded == unseen.parameters == model.num_parameters()
    measure(asked, "m", unseen, {})
    decoder = read_manifest(path)["parameters"]["total"]
    assert known.parameters == unseen.parameters == decoder < model.num_parameters()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gpt_oss", "mamba"])
def test_generation_is_counted_whatever_the_kind(kind: str, tmp_path: Path) -> None:
    # Of these transformers' code runs through without weights, to logits that have no numbers.
    tokenizer = tiny_tokenizer()
    config_ = small_config(kind, vocab_size=len(tokenizer))
    made = auto_class(config_).from_config(config_)
    made.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    entry = write_task(tmp_path / "tasks", "words", rolling_documents(3), **GENERATION)
    config = make_config(
        {"model": {"path": str(tmp_path / "model"), "max_length": 64}}, {"words": entry}
    )
    unknowns = Unknowns()
    tasks = load_tasks({"words": entry}, config.seed)
    cost = look(config, "model", tasks, tmp_path / "none.json", unknowns).costs["words"]
    assert not unknowns
    # Of the 12 tokens that it may generate, the last is not fed back.
    assert cost.generation == 11 * cost.documents == 33


def test_a_task_that_would_fail_says_why(model_folder: Path, tmp_path: Path) -> None:
    entry = write_task(tmp_path / "tasks", "words", rolling_documents(2), **GENERATION)
    config = make_config({"tiny": {"path": str(model_folder), "max_length": 12}}, {"words": entry})
    unknowns = Unknowns()
    tasks = load_tasks({"words": entry}, config.seed)
    assert not look(config, "tiny", tasks, tmp_path / "none.json", unknowns).costs
    ((reason, what),) = unknowns.items()
    assert what == ["words with tiny"]
    assert "max tokens to generate (12) must be less than model's maximum" in reason


def test_equal_requests_are_run_once(model_folder: Path, tmp_path: Path) -> None:
    entry = write_task(tmp_path, "letters", letter_documents(), **CHOICE)
    config = make_config({"tiny": {"path": str(model_folder)}}, {"letters": entry})
    tasks = load_tasks({"letters": entry}, config.seed)
    cost = look(config, "tiny", tasks, tmp_path / "none.json", Unknowns()).costs["letters"]
    # Four options of one token share a row; more than one row's tokens are padding alone.
    assert cost.requests <= cost.positions < 2 * cost.requests


@pytest.mark.parametrize("sites", [["input"], ["gate"], ["all_inputs", "up"]])
def test_store_bytes_are_those_of_the_store(
    sites: list[str],
    manifest: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, store = captured(sites, manifest, model_folder, tmp_path, monkeypatch)
    tensors = [name for name, _ in store.groups() if name != "text"]
    real = sum(array.nbytes for name in tensors for _, array in store[name].arrays())

    outlook = look(config, "tiny", {}, manifest, Unknowns())
    assert sorted(tensors) == capture.tensors_of(sites)
    assert outlook.store_bytes(captured_tokens(config), tensors) == real
    # What the configuration of an unseen model says comes to the same.
    unseen = look(config, "tiny", {}, tmp_path / "none.json", Unknowns())
    assert unseen.store_bytes(captured_tokens(config), tensors) == real


def test_store_bytes_of_a_mixture_have_its_routing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sites = save_mixture(tmp_path / "model", "qwen2_moe"), ["gate", "input"]
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    config, store = captured(sites, manifest, folder, tmp_path, monkeypatch)
    arrays = {path: one for path, one in store.members(max_depth=None) if "/" in path}
    real = sum(one.nbytes for path, one in arrays.items() if not path.startswith("text/"))
    assert "experts.index/layer_000" in arrays
    known = look(config, "tiny", {}, manifest, Unknowns())
    unseen = look(config, "tiny", {}, tmp_path / "none.json", Unknowns())
    measure(config, "tiny", unseen, {})
    for outlook in (known, unseen):
        found = outlook.store_bytes(captured_tokens(config), capture.tensors_of(sites))
        assert found == real


def captured(
    sites: list[str], manifest: Path, folder: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> tuple[Config, Any]:
    """A configuration, and the store that a capture of these sites leaves."""
    words = tmp_path / "text.txt"
    words.write_text("the old cat sees a bird over the river and the child hides " * 40)
    config = make_config(
        {"tiny": {"path": str(folder)}},
        {"t": {}},
        texts={"prose": {"file": str(words)}},
        capture={"tokens": 100, "sequence_length": 16},
        block={"sites": sites},
    )
    arguments = {
        "--model": manifest,
        "--site": sites[0],
        "--siblings": ",".join(sites),
        "--settings": grid.capture_slice(config, "tiny"),
        "--store": tmp_path / "a.zarr",
        "--output": tmp_path / "site.json",
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    patch.setattr(sys, "argv", ["capture", *flat])
    capture.main()
    return config, zarr.open_group(tmp_path / "a.zarr", mode="r")


def write_eval(folder: Path, *tasks: str) -> None:
    write_manifest(folder / "eval.json", {"tasks": {task: {} for task in tasks}})


def of_rule(found: list[Job], rule: str) -> list[Job]:
    return [job for job in found if job.rule == rule]


def test_finished_nodes_are_not_charged(tmp_path: Path) -> None:
    config = make_config(
        {"m": {"path": "m"}},
        {"a": {}, "b": {}},
        block={"sites": ["input"], "levels": [0.9, 0.5, 0.1]},
    )
    write_eval(tmp_path / "m/topp/input/0.9", "a", "b")
    write_eval(tmp_path / "m/topp/input/0.5", "a")
    write_eval(tmp_path / "m/dense", "b", "a")
    found = jobs(config, tmp_path)
    assert [job.done for job in of_rule(found, "evaluate")] == [True, False, False]
    asked = [set(job.evaluations) for job in of_rule(found, "evaluate")]
    assert asked == [set(), {"b"}, {"a", "b"}]
    assert [job.done for job in of_rule(found, "dense")] == [True]
    assert sum(job.finished for job in found) == 1


def test_a_search_for_several_p_takes_more_levels(tmp_path: Path) -> None:
    config = make_config(
        {"m": {"path": "m"}}, {"a": {}}, search={"max_levels": 9, "ppl": [1, 5, 10]}
    )
    (fresh, *_) = of_rule(jobs(config, tmp_path), "search")
    assert fresh.nodes == Amount(10, 15)


def test_searches(tmp_path: Path) -> None:
    block = {"sites": ["input", "up"]}
    config = make_config(
        {"m": {"path": "m"}}, {"a": {}, "b": {}}, block=block, search={"max_levels": 9}
    )
    folder = tmp_path / "m/topp/input"
    (fresh, _) = of_rule(jobs(config, tmp_path), "search")
    assert fresh.nodes == fresh.evaluations["a"] == Amount(6, 9)

    # Cut off after two levels, of which the second lacks a task.
    write_eval(folder / "0.9", "a", "b")
    write_eval(folder / "0.5", "a")
    (begun, _) = of_rule(jobs(config, tmp_path), "search")
    assert not begun.done
    assert begun.nodes == Amount(6, 9)
    assert begun.evaluations == {"a": Amount(4, 7), "b": Amount(5, 8)}
    assert begun.finished == 1

    # Finished since.
    write_eval(folder / "0.5", "a", "b")
    levels = [{"level": "0.9"}, {"level": "0.5"}]
    write_manifest(folder / "search.json", {"levels": levels})
    (finished, other) = of_rule(jobs(config, tmp_path), "search")
    assert finished.done
    assert finished.nodes == Amount.exactly(2)
    assert not finished.evaluations
    assert not other.done

    # One node deleted: made again by a job of its own.
    (folder / "0.5/eval.json").unlink()
    found = jobs(config, tmp_path)
    (lost,) = of_rule(found, "evaluate")
    assert set(lost.evaluations) == {"a", "b"}
    assert of_rule(found, "search")[0].done
    assert sum((job.nodes for job in found if job.node == ("topp", "input")), Amount()) == (
        Amount.exactly(2)
    )


OTHER_FILES = [
    *("run_config.yaml", "m/model.json", "m/capture/input.json", "m/metrics/input.parquet"),
    *("m/topp/input/sparsity.parquet", "m/topp/input/curve.json", "m/summary.csv"),
    *("critical_sparsity.csv", "figures/x.svg", "index.html"),
]


def test_every_other_job_is_done_when_its_file_is_there(tmp_path: Path) -> None:
    config = make_config(
        {"m": {"path": "m"}}, {"a": {}}, block={"sites": ["input"], "levels": [0.5]}
    )
    for number, name in enumerate(OTHER_FILES):
        assert sum(job.done for job in jobs(config, tmp_path)) == number
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    left = {job.rule for job in jobs(config, tmp_path) if not job.done}
    assert left == {"dense", "evaluate"}


def test_all_done_needs_no_time(model_folder: Path, tmp_path: Path) -> None:
    entry = write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE)
    config = make_config(
        {"m": {"path": str(model_folder)}},
        {"choice": entry},
        block={"sites": ["input"], "levels": [0.5]},
    )
    results = tmp_path / "results"
    for name in OTHER_FILES:
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).touch()
    write_model_manifest(model_folder, results / "m/model.json")
    write_eval(results / "m/dense", "choice")
    write_eval(results / "m/topp/input/0.5", "choice")
    printed = text(config, forecast(config, results), (2, 2))
    assert "Nothing is left to do." in printed
    row = next(line for line in printed.splitlines() if line.startswith("m "))
    assert row.split()[2:] == ["1", "1", "1", "0", "0", "B", "0", "B", "0", "s"]


def test_a_manifest_from_before_attention_was_looked_for(
    model_folder: Path, tmp_path: Path
) -> None:
    path = write_model_manifest(model_folder, tmp_path / "model.json")
    manifest = read_manifest(path)
    for entry in manifest["ffn"]:
        del entry["attention"]
    write_manifest(path, manifest)
    config = make_config(
        {"tiny": {"path": str(model_folder)}}, {}, block={"sites": ["input"], "levels": [0.5]}
    )
    outlook = look(config, "tiny", {}, path, Unknowns())
    assert [shape["input"] for shape in outlook.shapes] == [
        entry["hidden"] for entry in manifest["ffn"]
    ]


@pytest.mark.parametrize("method", ["hqq", "gptq", "fp8"])
def test_what_will_be_refused_is_no_traceback(
    method: str, model_folder: Path, tmp_path: Path
) -> None:
    """Of some, transformers' own configuration wants a package that is not here."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    block = {"sites": ["input"], "levels": [0.5]}
    unknowns = Unknowns()
    look(
        make_config({"tiny": {"path": str(folder)}}, {}, block=block),
        "tiny",
        {},
        tmp_path / "no",
        unknowns,
    )
    (said,) = unknowns
    assert f"a quantised checkpoint ({method})" in said


@pytest.mark.parametrize(("beyond", "contexts"), [(0, [1]), (1, []), (100_000, [])])
def test_times_beyond_the_models_length_end_in_a_line(
    beyond: int, contexts: list[int], model_folder: Path, tmp_path: Path
) -> None:
    """The last context that leaves room for what is timed after it is planned, the next one is not."""
    last = MAX_LENGTH - STEPS
    block = {"sites": ["input"], "criteria": ["topp"], "levels": [0.5]}
    block |= {"speed": {"device": "cpu", "contexts": [*contexts, last + beyond]}}
    config = make_config({"tiny": {"path": str(model_folder)}}, {}, block=block)
    unknowns = Unknowns()
    if not beyond:
        assert look(config, "tiny", {}, tmp_path / "no", unknowns).parameters
        assert not unknowns
        return
    said = f"config: speed: contexts: {last + beyond} and .* {MAX_LENGTH} that tiny .* use at most {last}$"
    with pytest.raises(AtlasError, match=said):
        look(config, "tiny", {}, tmp_path / "no", unknowns)


def test_what_cannot_be_known_is_said(model_folder: Path, tmp_path: Path) -> None:
    tasks = {
        "choice": write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE),
        "absent": write_task(tmp_path / "tasks", "absent", choice_documents(), **CHOICE),
    }
    (tmp_path / "tasks/absent.jsonl").unlink()
    config = make_config(
        {"tiny": {"path": str(model_folder)}, "far": {"hub": "nobody/has-this"}},
        tasks,
        block={"sites": ["intermediate"], "levels": [0.9, 0.5], "criteria": ["topp", "topk"]},
    )
    arguments = ("--cores", "2", "--config", config.model_dump_json(exclude_none=True))
    done = Checkout(tmp_path).stage("plan", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (tiny,) = (line.split() for line in lines if line.startswith("tiny"))
    (far,) = (line.split() for line in lines if line.startswith("far "))
    (whole,) = (line.split() for line in lines if line.startswith("all ") and len(line) > 60)
    assert far[:5] == ["far", "unknown", "2", "4", "0"]
    assert far[5:8] == ["unknown"] * 3
    # Dense and four nodes, of the one task that is here.
    (tokens,) = (line.split()[2] for line in lines if line.startswith("choice "))
    assert tiny[5] == f"≥{5 * int(tokens):,}" == whole[4]
    assert "far: models: nobody/has-this at main on the Hub: not in the cache" in done.stdout
    assert "task absent: 'absent': cannot be loaded: " in done.stdout
    assert "Time: at least" in done.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("entry", "expected"), [({"hub": "a/b"}, "1"), ({"path": "m"}, None)])
def test_an_unreachable_hub_is_asked_once(
    entry: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    go_offline_if_unreachable(make_config({"m": entry}, {"t": {"include": "tasks"}}))
    assert os.environ.get("HF_HUB_OFFLINE") == expected


class _Clock(rates.TimedLM):
    """Times are the positions of a batch."""

    def __init__(self, speed: float) -> None:
        self.speed, self._device = speed, torch.device("cpu")

    def time(self, batch: Batch) -> float:
        return batch.positions / self.speed


def test_a_quick_batch_is_timed_whole_and_a_slow_one_in_part() -> None:
    batch = Batch([list(range(100))] * 7 + [list(range(40))], [2] * 8)
    assert rates.piece(_Clock(1e9), batch).rows == batch.rows
    slow = rates.piece(_Clock(10), batch)
    assert (len(slow.rows), slow.positions) == (1, 32)
    between = rates.piece(_Clock(1000), batch)
    assert 0.05 < between.positions / 1000 < 0.8


def test_metrics_are_planned_by_what_is_captured(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    asked = []

    def seconds(tokens: int, width: int, *, ranked: bool = True) -> float:
        asked.append((tokens, width, ranked))
        return 100.0

    monkeypatch.setattr("sparsity_atlas.plan.forecast.metrics_seconds", seconds)
    config = make_config(
        {"m": {"path": str(model_folder)}},
        {"choice": write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE)},
        block={"sites": ["intermediate", "input"], "levels": [0.5]},
    )
    found = forecast(config, tmp_path / "results")
    layers = found.outlooks["m"].layers
    metrics = [
        took.expected
        for job, took in zip(found.jobs, found.seconds, strict=True)
        if job.rule == "metrics"
    ]
    assert asked
    assert {tokens for tokens, _, _ in asked} == {captured_tokens(config)}
    assert all(ranked for _, _, ranked in asked)
    assert sum(metrics) == pytest.approx(100.0 * len(asked), rel=0.2)
    assert len(asked) == layers * len(metrics)


def test_a_layer_of_more_tokens_takes_longer() -> None:
    few, many = (rates.metrics_seconds(tokens, 64) for tokens in (1_000, 1_000_000))
    assert many > 10 * few > 0
    assert rates.metrics_seconds(1_000_000, 64, ranked=False) > 0


def test_recorded_times_are_means_by_rule(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jsonl").write_text(
        '{"rule_name": "curve", "s": 1}\n{"rule_name": "curve", "s": 3}\n'
    )
    (tmp_path / "y.jsonl").write_text('{"rule_name": "model", "s": 5.5}\n{"s": 7}\n')
    assert rates.recorded(tmp_path) == {"curve": 2, "model": 5.5}
    assert rates.recorded(tmp_path / "none") == {}


def test_layers_that_are_an_attention_alone_have_no_ffn() -> None:
    shapes = [{"qkv_input": 8, "o_input": 8}, {"input": 8, "intermediate": 16}]
    assert Outlook(parameters=1536, shapes=shapes).ffn_share == 3 * 8 * 16 / 1536


def test_amounts_in_words() -> None:
    assert show(Amount.exactly(1234)) == "1,234"
    assert show(Amount(7, 9) + Amount(7, 9)) == "~14"
    assert show(UNKNOWN) == "unknown"
    assert show(Amount.exactly(52) + UNKNOWN) == "≥52"
    assert show(Amount(30, 90), duration) == "30 s"
    assert show(Amount(7, 9) * 3) == show(Amount(21, 27))
    assert [size(0), size(999), size(2**20), size(3.5 * 2**40)] == (
        ["0 B", "999 B", "1.0 MiB", "3.5 TiB"]
    )
    assert [duration(59), duration(90), duration(7200)] == ["59 s", "1.5 min", "2.0 h"]


def test_a_calibrated_criterion_is_planned_before_its_calibration(
    model_folder: Path, tmp_path: Path
) -> None:
    entry = write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE)
    config = make_config(
        {"m": {"path": str(model_folder)}},
        {"choice": entry},
        block={"criteria": ["teal"], "sites": ["input"], "levels": [0.5]},
        criteria={"teal": {}},
        calibration={"tokens": 256},
    )
    planned = forecast(config, tmp_path / "results")
    (job,) = (job for job in planned.jobs if job.rule == "calibrate")
    assert job.node == ("teal", "input")
    assert not job.done
    # Its thresholds are not known yet; its nodes are timed all the same.
    assert all(amount.complete for amount in planned.seconds)
    (tmp_path / "results/m/teal/input").mkdir(parents=True)
    (tmp_path / "results/m/teal/input/calibration.safetensors").touch()
    (job,) = (job for job in jobs(config, tmp_path / "results") if job.rule == "calibrate")
    assert job.done


def test_the_end_takes_its_curves_and_figures(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparsity_atlas.plan.forecast.figure_seconds",
        lambda *suffixes, panels: 50.0 * len(suffixes) * panels,
    )
    config = make_config(
        {"m": {"path": str(model_folder)}},
        {"choice": write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE)},
        block={"sites": ["input", "intermediate"], "levels": [0.5]},
    )
    planned = forecast(config, tmp_path / "results")
    took = dict(zip([job.rule for job in planned.jobs], planned.seconds, strict=True))
    assert took["tables"].expected == pytest.approx(5 * (1 + 2 * TABLES_OF_A_CURVE))
    assert took["figures"].expected == pytest.approx(5 + 150 * len(wanted(config)))
    assert took["page"].expected == pytest.approx(5 + 75 * len(MODEL_FIGURES))
    # Half of two panels and half of one; a run of one model and site has smaller figures.
    assert figure_seconds("svg", panels=6) > figure_seconds("svg", panels=1) > 0
    assert figure_seconds("svg", panels=7) == pytest.approx(figure_seconds("svg", panels=6), rel=1)


def test_an_allocation_is_timed_by_what_it_runs(model_folder: Path, tmp_path: Path) -> None:
    """Forward passes of its candidates, over the tokens that divergences are measured on."""
    criteria = {"teal": {}, "evolved": {"rule": "teal", "allocation": "evolutionary"}}
    block = {"sites": ["input"], "levels": [0.5], "criteria": list(criteria)}
    config = make_config(
        {"m": {"path": str(model_folder)}},
        {"choice": write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE)},
        block=block,
        **{"criteria": criteria, "calibration": {"tokens": 256}},
    )
    planned = forecast(config, tmp_path / "results")
    took = {
        job.node[0]: seconds.expected
        for job, seconds in zip(planned.jobs, planned.seconds, strict=True)
        if job.rule == "calibrate" and job.node is not None
    }
    outlook = planned.outlooks["m"]
    once = sum(outlook.seconds[None].values())
    once /= sum(outlook.costs[task].positions for task in outlook.seconds[None])
    # Of two layers at nine targets, and of one tensor of each alone at 21 sparsities.
    run = 1024 * (1 + 9 * (3 + 6 * 4 * 2) + 21)
    assert took["evolved"] - took["teal"] == pytest.approx(run * once)


def test_a_study_of_single_layers(model_folder: Path, tmp_path: Path) -> None:
    """One pass over the captured text, and one for each layer, tensor and level."""
    config = make_config(
        {"m": {"path": str(model_folder)}},
        {"choice": write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE)},
        block={"sites": ["all_inputs"], "levels": [0.5], "sensitivity": [0.9, 0.5, 0.3]},
    )
    planned = forecast(config, tmp_path / "results")
    took = dict(zip((job.rule for job in planned.jobs), planned.seconds, strict=True))
    (job,) = (job for job in planned.jobs if job.rule == "sensitivity")
    assert job.passes == 3 * 2
    outlook = planned.outlooks["m"]
    assert len(outlook.shapes) == 2
    dense = outlook.seconds[None]
    once = config.capture.tokens * sum(dense.values())
    once /= sum(outlook.costs[task].positions for task in dense)
    passes = {rule: took[rule].expected - took["model"].expected for rule in took}
    assert passes["sensitivity"] == pytest.approx((1 + 2 * 6) * once)
    # The FFNs alone, dense and at one level.
    ffns = sum(3 * shape["input"] * shape["intermediate"] for shape in outlook.shapes)
    assert passes["output_error"] == pytest.approx(2 * once * ffns / outlook.parameters)


@pytest.mark.parametrize(("site", "passes"), [("gate", 7), ("intermediate", 7), ("input", 1)])
def test_predictors_of_masks_take_their_passes(site: str, passes: int) -> None:
    config = make_config({"m": {"path": "m"}}, {"any": {}})
    job = Job("output_error", "m", False, ("topp", site))
    assert passes_of_a_level(config, job) == 1
    asked = config.model_copy(update={"studies": StudySettings(predictors=[4, 16])})
    assert passes_of_a_level(asked, job) == passes


@pytest.mark.parametrize(("asked", "passes"), [(None, 0), (["given"], 11), (["generated"], 17)])
def test_masks_of_prompts_take_their_passes(asked: list[str] | None, passes: int) -> None:
    """Two dense ones and three a level; writing what follows the prompts six more."""
    config = make_config({"m": {"path": "m"}}, {"any": {}})
    studies = StudySettings.model_validate({"prompt_reuse": asked})
    assert passes_of_reuse(config.model_copy(update={"studies": studies}), 3) == passes


def test_a_local_dimension_takes_as_the_square_of_its_points() -> None:
    assert dimension_seconds(0, 64) == 0
    few, many = dimension_seconds(100, 64), dimension_seconds(2000, 64)
    assert many > 4 * few > 0


def test_what_tells_right_answers_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each layer and tensor the square of the answers; areas of two estimates, in all and two halves."""
    config = make_config({"m": {"path": "m"}}, {"any": {}})
    asked = {"tasks": ["any"], "tensors": ["residual", "intermediate"], "samples": 50}
    studies = StudySettings.model_validate({"truthfulness": asked})
    config = config.model_copy(update={"studies": studies})
    monkeypatch.setattr("sparsity_atlas.plan.forecast.point_seconds", lambda n, width, k: n * width)
    monkeypatch.setattr("sparsity_atlas.plan.forecast.area_seconds", lambda n, replicates: 1000.0)
    cost = TaskCost(80, 100, 0, 90, 1, 0, Batch([[1]], [1]), 0.0, 0.0)
    outlook = Outlook(shapes=[{"input": 3, "intermediate": 7}] * 2, costs={"any": cost})
    found = truthfulness_seconds(config, outlook, "any")
    assert found == Amount.exactly(50 * 2 * (3 + 7) + 1000 * (6 * 4 + 2))
    assert truthfulness_seconds(config, Outlook(), "any") == UNKNOWN
    assert rates.point_seconds(81, 8, 20) == 0
    assert rates.point_seconds(100, 8, 4) > 0
    assert rates.area_seconds(50, 100) > 0


class _Passes(rates.TimedLM):
    """On a GPU it takes as long over a few tokens as over hundreds, and the first of a shape longer."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.asked: set[int] = set()

    def time(self, batch: Batch) -> float:
        if self.device.type == "cpu":
            return 5e-4 * batch.positions
        first = batch.positions not in self.asked
        self.asked.add(batch.positions)
        return 5.0 * first + 0.05 + 1e-4 * batch.positions


@pytest.mark.parametrize(("device", "said"), [("cpu", 10.0), ("cuda", 20 * 0.0532 + 20_000 * 1e-4)])
def test_passes_on_a_gpu_go_by_their_number_too(device: str, said: float) -> None:
    """One over 32 tokens was taken for the rate of all: a search of half a minute for six."""
    lm, batch = _Passes(device), Batch([list(range(100))] * 10, [1] * 10)
    cost = TaskCost(10, 0, 0, 20_000, 20, 0, batch, 0.0, 0.0)
    assert rates._seconds(lm, rates.piece(lm, batch), cost) == pytest.approx(said)


def test_a_job_builds_its_requests_once() -> None:
    cost = TaskCost(
        documents=10,
        requests=100,
        generation=0,
        positions=100,
        passes=1,
        steps=0,
        sample=Batch([[1, 2]], [1]),
        building=40.0,
        overhead=3.0,
    )
    node = ("topp", "input")
    job = Job("search", "m", False, node, evaluations={"choice": Amount(7, 9)})
    outlook = Outlook(costs={"choice": cost}, ready=1000.0, seconds={node: {"choice": 2.0}})
    start = Start(light=0.0, capture=0.0, heavy=100.0, tasks=10.0, recorded={})
    took = evaluation_seconds(job, outlook, start)
    assert (took.expected, took.most) == (1150 + 7 * 5, 1150 + 9 * 5)


def test_short_requests_are_batched_as_on_the_device_that_they_are_meant_for() -> None:
    assert shortest("cpu", 640, 4096) == 0
    assert shortest("cuda", 4096, 8192) == 1024
    assert shortest("cuda", 2304, 8192) == 1024
    assert shortest("cuda", 2048, 8192) == 2048
    assert shortest("cuda", 640, 8192) == shortest("cuda", 64, 8192) == 4096
    assert shortest("cuda", 640, 300) == 300


def test_jobs_with_a_model_share_the_gpus_and_all_jobs_the_cores(model_folder: Path) -> None:
    config = make_config({"m": {"path": str(model_folder)}}, {})
    jobs = [Job("search", "m", done=False)] * 4 + [Job("metrics", "m", done=False)] * 16
    seconds = [Amount.exactly(100.0)] * 4 + [Amount.exactly(60.0)] * 16
    found = Forecast(jobs, seconds, {}, Unknowns(), [0.0] * len(jobs))
    # 1,360 s of 16 cores; of the one GPU 400. Nothing waits for metrics.
    assert "about 6.7 min, with 16 jobs at once, 1 of them with a model, on" in text(
        config, found, (16, 1)
    )
    assert "about 1.7 min, with 16 jobs at once on" in text(config, found, (16, 16))
    # Of two cores as many have a model as work.
    assert "about 11.3 min, with 2 jobs at once on" in text(config, found, (2, 2))


def test_a_plan_times_imports_only_where_something_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def timed(modules: str) -> float:
        asked.append(modules)
        return float(len(asked))

    monkeypatch.setattr("sparsity_atlas.plan.rates.import_seconds", timed)
    with importing(anything=False) as nothing:
        assert nothing == {}
    with importing(anything=True) as found:
        assert sorted(one.result() for one in found.values()) == [1, 2, 3, 4, 5]
    assert len(asked) == len(found) == 5


class _OnAClock(_Passes):
    """Its passes take their time of a clock; what was attached is noted."""

    def __init__(self, device: str, clock: list[float]) -> None:
        super().__init__(device)
        self.clock = clock

    def start(self, *_: Any) -> None:
        """Begin nothing."""

    def time(self, batch: Batch) -> float:
        took = super().time(batch)
        self.clock[0] += took
        return took


@pytest.mark.parametrize(("device", "longer"), [("cpu", 0.0), ("cuda", 10.0)])
def test_what_first_passes_take_longer_is_told_from_what_all_take(
    device: str, longer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each process has plans of its own for each shape: 5 s of a start were missing."""
    clock, attached = [0.0], []
    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock[0])

    class FakeSession:
        lm = _OnAClock(device, clock)

        def attach(self, node: Any) -> Any:
            attached.append(node)
            return contextlib.nullcontext()

    monkeypatch.setattr(rates, "Journal", lambda *_: None)
    batch = Batch([list(range(100))] * 10, [1] * 10)
    cost = TaskCost(10, 0, 0, 20_000, 20, 0, batch, 0.0, 0.0)
    sparse = Node.make({"rule": "topp"}, "input", "0.9")
    found, seconds = rates.node_seconds(FakeSession(), [sparse, None], {"choice": cost})
    assert attached == [None, sparse]  # the dense one is timed once
    assert found == pytest.approx(longer, abs=1e-6)
    assert seconds[0] == pytest.approx(seconds[1])
    expected = 10.0 if device == "cpu" else 20 * 0.0532 + 20_000 * 1e-4
    assert seconds[0]["choice"] == pytest.approx(expected)


def test_the_longest_chain_has_one_job_of_each_stage(model_folder: Path) -> None:
    """A run of 1 min 46 s was said to take 2.3: captures were put in front of the dense baseline."""
    config = make_config({"m": {"path": str(model_folder)}}, {})
    chain = {
        **{"model": 60.0, "capture": 90.0, "dense": 120.0, "metrics": 200.0, "search": 300.0},
        **{"output_error": 30.0, "curve": 60.0, "model_summary": 60.0},
    }
    jobs = [Job(rule, "m", done=False) for rule in chain]
    jobs += [Job("tables", "", done=False)]
    seconds = [Amount.exactly(one) for one in (*chain.values(), 120.0)]
    found = Forecast(jobs, seconds, {}, Unknowns(), [0.0] * len(jobs))
    # 60 + 120 + 300 + 60 + 60 of the model, and the tables.
    assert "about 12.0 min, with 9 jobs at once" in text(config, found, (16, 16))
    seconds[3] = Amount.exactly(600.0)  # metrics, behind 60 and 90
    assert "about 14.5 min, with 9 jobs at once" in text(config, found, (16, 16))
