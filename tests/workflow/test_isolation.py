"""Models and texts that cannot be used: one line each, and the others' results are there."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkout import Checkout, change_weights, smoke_config


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def quantised(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({**content, "quantization_config": {"quant_method": "unheard-of", "bits": 4}})
    )


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


# How a model folder is spoilt, and what its log must say.
SPOILT: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "weightless": (without_weights, ["models/weightless", "*.safetensors"]),
    "speechless": (without_tokenizer, ["models/speechless", "tokenizer"]),
    "truncated": (truncated, ["models/truncated", "damaged safetensors"]),
    "quantised": (quantised, ["models/quantised", "quantised", "unheard-of", "not supported"]),
    "missing": (missing, ["models/missing", "no such folder"]),
}


Tried = tuple[Checkout, subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def tried(
    smoke: Checkout, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkout, subprocess.CompletedProcess]:
    """A run of good and bad models, and how it ended."""
    checkout = smoke.copy(tmp_path_factory.mktemp("isolation") / "atlas")
    shutil.rmtree(checkout.results / "zoo-small" / "dense")
    for name, (spoil, _) in SPOILT.items():
        spoil(checkout.add_model(name))
    done = checkout.run(
        *(f"results/{name}/dense/eval.json" for name in ["zoo-small", "remote", *SPOILT]),
        config=bad_models(),
    )
    return checkout, done


def bad_models() -> dict[str, Any]:
    """The smoke configuration with the bad models in it."""
    config = smoke_config()
    config["models"] = {name: {"path": f"models/{name}"} for name in SPOILT}
    config["models"]["remote"] = {"hub": "sparsity-atlas/not-in-the-cache"}
    config["run"].append({**config["run"][1], "models": list(config["models"])})
    return config


def test_the_good_model_has_its_results(tried: Tried, smoke: Checkout) -> None:
    checkout, done = tried
    assert done.returncode == 1
    assert checkout.contents("zoo-small/dense") == smoke.contents("zoo-small/dense")


@pytest.mark.parametrize("name", [*SPOILT, "remote"])
def test_a_bad_model_says_why_in_one_line(tried: Tried, name: str) -> None:
    checkout, done = tried
    words = SPOILT[name][1] if name in SPOILT else ["sparsity-atlas/not-in-the-cache", "Hub"]
    lines = (checkout.results / "logs" / name / "model.log").read_text().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert lines[-1:] == errors
    assert all(word in errors[0] for word in words), errors
    assert "Traceback" not in done.stdout
    assert not (checkout.results / name / "model.json").exists()
    # It is shown on the terminal, too.
    assert f"[failed] model {name}: {errors[0].removeprefix('error: ')}" in done.stdout


def test_too_short_a_text(smoke: Checkout, tmp_path: Path) -> None:
    config = smoke_config()
    config["capture"]["tokens"] = 1_000_000
    checkout = smoke.copy(tmp_path / "atlas")
    done = checkout.run("results/zoo-small/capture/input.json", config=config)
    assert done.returncode == 1
    lines = (checkout.results / "logs/zoo-small/capture/input.log").read_text().splitlines()
    assert lines[-1].startswith("error: ")
    assert "prose.jsonl" in lines[-1]
    assert "1,000,000 are asked for" in lines[-1]
    assert not (checkout.results / "zoo-small/capture/input.json").exists()


def test_weights_that_are_not_numbers(smoke: Checkout, tmp_path: Path) -> None:
    """NaN is a result: the node and its curve are there and say that they failed."""
    checkout = smoke.copy(tmp_path / "atlas")
    not_a_number = 0x7FC0
    folder = checkout.add_model("broken")
    change_weights(folder, "model.norm.weight", lambda bits: np.full_like(bits, not_a_number))
    config = smoke_config()
    config["models"] = {"broken": {"path": "models/broken"}}
    config["run"].append({**config["run"][1], "models": ["broken"], "levels": [0.5]})
    done = checkout.run("results/broken/topk/intermediate/curve.json", config=config)
    assert done.returncode == 0, done.stdout
    for name in ("dense", "topk/intermediate/0.5"):
        result = json.loads((checkout.results / "broken" / name / "eval.json").read_text())
        assert result["status"] == "failed"
        assert "NaN" in result["tasks"]["few_pairs"]["reason"]
    curve = json.loads((checkout.results / "broken/topk/intermediate/curve.json").read_text())
    assert [one["level"] for one in curve["failures"]] == ["dense", "0.5"]
