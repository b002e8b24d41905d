"""A whole run of mixtures of experts, from capture to report."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from checkout import Checkout, smoke_config
from mixtures import EXPERTS, save_mixture
from sparsity_atlas.activations.store import ActivationStore

# Routed experts alone; with a shared one; behind a dense layer.
MODELS = {"olmoe": "olmoe", "shared": "qwen2_moe", "dense-first": "deepseek_v2"}
PARTS = {
    "olmoe": {"experts"},
    "shared": {"shared", "experts"},
    "dense-first": {"ffn", "shared", "experts"},
}


def config(folder: Path) -> dict[str, Any]:
    changed = smoke_config()
    changed["models"] = {name: {"path": str(folder / name)} for name in MODELS}
    changed["run"] = [
        {
            **{"models": list(MODELS), "criteria": ["topk"], "sites": ["intermediate"]},
            **{"levels": [0.5], "tasks": ["few_pairs"]},
        }
    ]
    return changed


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The run. Leave it as it is."""
    folder = tmp_path_factory.mktemp("mixtures")
    for name, family in MODELS.items():
        save_mixture(folder / name, family, max_position_embeddings=256)
    checkout = Checkout.make(folder / "atlas")
    done = checkout.run(config=config(folder))
    assert done.returncode == 0, done.stdout
    assert (checkout.results / "index.html").is_file()
    return checkout


def test_every_part_has_metrics_and_an_output_error(run: Checkout) -> None:
    metrics = table(run.results / "metrics.csv")
    for name, parts in PARTS.items():
        own = [row for row in metrics if row["model"] == name]
        assert {row["part"] for row in own} == parts
        stored = ActivationStore(run.results / name / "activations.zarr")
        for layer in stored.layers("experts.index"):
            experts = [row for row in own if (row["part"], row["layer"]) == ("experts", str(layer))]
            assert [row["expert"] for row in experts] == [str(one) for one in range(EXPERTS)]
            assert sum(int(row["tokens"]) for row in experts) == len(
                stored.read("experts.intermediate", layer)
            )
            assert any(row["effective_rank"] for row in experts)
        errors = pq.read_table(run.results / name / "topk/intermediate/sparsity.parquet")
        for row in errors.to_pylist():
            assert {part["part"] for part in row["parts"]} <= parts
            assert all(0 < part["error"] < 1 for part in row["parts"])
    rows = table(run.results / "output_error.csv")
    for name, parts in PARTS.items():
        assert {row["part"] for row in rows if row["model"] == name} == {""} | parts
    assert {row["model"] for row in table(run.results / "curves.csv")} == set(MODELS)
    assert table(run.results / "failures.csv") == []


def test_the_doctor_looks_at_all_of_it(run: Checkout, tmp_path: Path) -> None:
    done = run.stage("doctor", "--results", "results")
    assert done.returncode == 0, done.stdout
    copied = run.copy(tmp_path / "atlas")
    for chunk in (copied.results / "shared/activations.zarr/experts.weights").rglob("c/0/0"):
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 0xFF
        chunk.write_bytes(content)
    done = copied.stage("doctor", "--results", "results")
    assert done.returncode == 1
    assert "activations.zarr" in done.stdout
