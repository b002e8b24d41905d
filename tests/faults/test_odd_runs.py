"""Folders that move, clocks that go back, two runs at once; and models and tasks that cannot be measured."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkout import Checkout
from faults import pipeline
from tiny_lm import CHOICE, LAST_WORD, choice_documents, save_model, sentences, write_task

# Folders and clocks


def test_results_in_another_folder(whole: Checkout, tmp_path: Path) -> None:
    """They are the results there, and nothing runs again."""
    moved = pipeline.copy(whole, tmp_path / "far" / "away")
    planned = moved.plan(config=pipeline.configuration())
    assert planned.returncode == 0, planned.text
    assert planned.jobs == set()


def test_a_clock_that_went_back(spoilt: Checkout, whole: Checkout) -> None:
    """Inputs of tomorrow: Snakemake refuses the job and says why, but what was computed is not lost."""
    manifest = spoilt.results / "tiny/model.json"
    os.utime(manifest, (time.time() + 86_400,) * 2)
    node = spoilt.results / "tiny/topk/intermediate/0.5"
    shutil.rmtree(node)
    config = pipeline.configuration()
    target = "results/tiny/topk/intermediate/0.5/eval.json"
    done = spoilt.run(target, config=config)
    assert done.returncode == 1
    assert "could indicate a clock skew" in done.stdout
    assert (node / "samples.parquet").is_file()
    assert not (node / "eval.json").exists()
    # When the clock has come to that time again.
    os.utime(manifest)
    assert spoilt.run_well(target, config=config) == []
    assert spoilt.contents("tiny") == whole.contents("tiny")


def test_two_runs_at_once(spoilt: Checkout, whole: Checkout) -> None:
    """The second is refused at once; the first is not disturbed."""
    node = spoilt.results / "tiny/topk/intermediate/0.5"
    shutil.rmtree(node)
    config = pipeline.configuration()
    target = "results/tiny/topk/intermediate/0.5/eval.json"
    spoilt.plan(target, config=config)  # writes variant.yaml
    spoilt.forget_forwards()
    first = spoilt.start(
        *("-m", "snakemake", "--cores", "1", target, "--configfile", "variant.yaml"), SLOW="1"
    )
    try:
        while not spoilt.forwards():
            assert first.poll() is None
            time.sleep(0.05)
        second = spoilt.run(target, config=config)
        assert second.returncode != 0
        assert "--unlock" in second.stdout
        assert first.wait(timeout=300) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert spoilt.contents() == whole.contents()


# Models and tasks


def one_node(model: str, tasks: list[str], levels: list[float], site: str) -> dict[str, Any]:
    """A run block."""
    return {
        **{"models": [model], "criteria": ["topk"], "sites": [site]},
        **{"levels": levels, "tasks": tasks},
    }


def explosive(folder: Path) -> None:
    """A model whose first FFN overflows if its input loses the smaller one of two entries.

    Two dimensions of the residual stream hold the same value; the norm halves one of them, and the
    gate's weights on them cancel. Without the halved one the gate is 1e20 times its input, and squared.
    """
    save_model(folder, hidden_act="relu2", tie_word_embeddings=False)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][:, 1] = weights["model.embed_tokens.weight"][:, 0]
    layer = "model.layers.0."
    weights[f"{layer}self_attn.o_proj.weight"][1] = weights[f"{layer}self_attn.o_proj.weight"][0]
    norm = weights[f"{layer}post_attention_layernorm.weight"]
    norm[:2] = torch.tensor([1.0, 0.5])
    gate = weights[f"{layer}mlp.gate_proj.weight"]
    gate[:, :2] = torch.tensor([1e20, -2e20])
    save_file(weights, path, {"format": "pt"})


@pytest.fixture(scope="module")
def odd(whole: Checkout, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, str]:
    """A run of the finished model beside others that cannot be measured, and what it said."""
    checkout = pipeline.copy(whole, tmp_path_factory.mktemp("odd") / "atlas")
    for name in ("models", "my_tasks"):
        (checkout.path / name).unlink()
        shutil.copytree(whole.path / name, checkout.path / name)
    explosive(checkout.path / "models/explosive")
    words = sentences(1, seed=3, shortest=400, longest=400)[0]
    long_prompt = [{**one, "context": words} for one in choice_documents(3)]
    tasks = {
        "long_prompt": (long_prompt, CHOICE),
        "long_answer": ([{"page": "the cat " + "x" * 600}, {"page": "a bird"}], LAST_WORD),
        "nothing": ([], CHOICE),
    }
    config = pipeline.configuration()
    for name, (documents, kind) in tasks.items():
        write_task(checkout.path / "my_tasks", name, documents, **kind)
        config["tasks"][name] = {"include": "my_tasks"}
    config["models"] |= {
        "explosive": {"path": "models/explosive"},
        **{name: {"path": "models/tiny", "batch_size": 4} for name in tasks},
    }
    config["run"] += [
        one_node("explosive", ["choice"], [1, 0.2], "input"),
        *(one_node(name, ["choice", name], [0.5], "input") for name in tasks),
    ]
    # Without a tokenizer: the one model here that has no results.
    save_model(checkout.path / "models/mute")
    for path in (checkout.path / "models/mute").glob("token*"):
        path.unlink()
    config["models"]["mute"] = {"path": "models/mute"}
    config["run"].append(one_node("mute", ["choice"], [0.5], "input"))
    targets = [f"results/{name}/topk/input/curve.json" for name in ("explosive", "mute", *tasks)]
    done = checkout.run(*targets, "results/explosive/topk/input/sparsity.parquet", config=config)
    assert done.returncode == 1
    return checkout, done.stdout


def result(checkout: Checkout, node: str) -> dict[str, Any]:
    return json.loads((checkout.results / node / "eval.json").read_text())


def test_the_others_have_their_results(odd: tuple[Checkout, str], whole: Checkout) -> None:
    checkout, _ = odd
    found = checkout.contents("tiny")
    assert found == whole.contents("tiny")
    page = (checkout.results / "index.html").read_text()
    assert "This run did not finish" in page
    assert all(name in page for name in ("explosive", "nothing", "long_answer", "mute"))
    assert "Traceback" not in page


def test_infinity_at_one_level(odd: tuple[Checkout, str]) -> None:
    """That level failed, with a reason; the level that drops nothing has its scores."""
    checkout, _ = odd
    assert result(checkout, "explosive/dense")["status"] == "ok"
    assert result(checkout, "explosive/topk/input/1")["status"] == "ok"
    broken = result(checkout, "explosive/topk/input/0.2")
    assert broken["status"] == "failed"
    assert "NaN or infinity" in broken["tasks"]["choice"]["reason"]
    curve = json.loads((checkout.results / "explosive/topk/input/curve.json").read_text())
    assert [one["level"] for one in curve["failures"]] == ["0.2"]
    page = (checkout.results / "index.html").read_text()
    assert "Tasks that failed, and at which levels" in page


def _only_choice(checkout: Checkout, name: str) -> None:
    """The other task has its curve, and the failed one is listed with it."""
    curve = json.loads((checkout.results / name / "topk/input/curve.json").read_text())
    assert {one["task"] for one in curve["points"]} == {"choice", "average"}
    assert [(one["task"], one["level"]) for one in curve["failures"]] == [
        (name, "dense"),
        (name, "0.5"),
    ]


def test_a_task_without_documents(odd: tuple[Checkout, str]) -> None:
    for node in ("dense", "topk/input/0.5"):
        tasks = result(odd[0], f"nothing/{node}")["tasks"]
        assert tasks["nothing"]["status"] == "failed"
        assert tasks["nothing"]["reason"].endswith("has no documents")
        assert tasks["choice"]["status"] == "ok"
    _only_choice(odd[0], "nothing")


def test_a_prompt_that_is_longer_than_the_context(odd: tuple[Checkout, str]) -> None:
    """Cut on its left, as lm-eval does."""
    assert result(odd[0], "long_prompt/dense")["tasks"]["long_prompt"]["status"] == "ok"


def test_an_answer_that_is_longer_than_the_context(odd: tuple[Checkout, str]) -> None:
    """It cannot be scored, and is named."""
    tasks = result(odd[0], "long_answer/dense")["tasks"]
    assert tasks["long_answer"]["status"] == "failed"
    assert "'long_answer', document 0: max_length" in tasks["long_answer"]["reason"]
    _only_choice(odd[0], "long_answer")
