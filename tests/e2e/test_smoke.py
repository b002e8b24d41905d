"""The whole pipeline on little: from an empty folder to the report."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
import zarr

from checkout import Checkout

CURVES = {("topp", "intermediate"), ("topp", "input"), ("topk", "intermediate")}


def table(smoke: Checkout, name: str) -> pd.DataFrame:
    return pd.read_csv(smoke.results / name, dtype={"level": str})


def test_every_file_of_the_path_grammar(smoke: Checkout) -> None:
    model = smoke.results / "zoo-small"
    for criterion, site in CURVES:
        folder = model / criterion / site
        assert (folder / "curve.json").is_file()
        assert (folder / "sparsity.parquet").is_file()
        assert (folder / "search.json").is_file() == (criterion == "topp")
        assert list(folder.glob("*/eval.json"))
    for name in (
        "model.json",
        "dense/eval.json",
        "capture/input.json",
        "metrics/input.parquet",
        "summary.csv",
    ):
        assert (model / name).is_file()
    assert "<html" in (smoke.results / "index.html").read_text(encoding="utf-8")
    for stem in ("zoo-small/model", "zoo-small/topk/intermediate/0.9/eval"):
        assert (smoke.results / "logs" / f"{stem}.log").is_file()
        (line,) = (smoke.results / "benchmarks" / f"{stem}.jsonl").read_text().splitlines()
        assert json.loads(line)["s"] > 0
    # Nothing temporary is left.
    assert not [
        path for path in smoke.results.rglob("*") if path.suffix in (".journal", ".tmp", ".partial")
    ]


def test_the_configuration_is_kept(smoke: Checkout) -> None:
    kept = yaml.safe_load((smoke.results / "run_config.yaml").read_text())
    assert kept["replicates"] == 100
    assert len(kept["run"]) == 2
    assert "zoo-large" in kept["models"]


def test_curves(smoke: Checkout) -> None:
    curves = table(smoke, "curves.csv")
    assert set(zip(curves["criterion"], curves["site"], strict=True)) == CURVES
    assert set(curves["model"]) == {"zoo-small"}
    task = curves[curves["task"] == "few_pairs"]
    dense = task[task["level"] == "dense"]
    assert len(dense) == len(CURVES)
    # Nothing of a SwiGLU model is zero by itself.
    assert (dense["sparsity"] == 0).all()
    own = task[task["level"] != "dense"]
    for _, curve in own.groupby(["criterion", "site"]):
        ordered = curve.assign(number=curve["level"].astype(float)).sort_values("number")
        assert ordered["sparsity"].between(0, 1).all()
        # Both criteria keep less at a lower level.
        assert ordered["sparsity"].is_monotonic_decreasing
    kept = own[own["criterion"] == "topk"].set_index("level")["sparsity"]
    # 256 channels: 230 and 128 of them are kept.
    assert kept["0.9"] == pytest.approx(26 / 256, abs=2e-3)
    assert kept["0.5"] == pytest.approx(0.5, abs=2e-3)


def test_critical_sparsity(smoke: Checkout) -> None:
    critical = table(smoke, "critical_sparsity.csv")
    assert set(zip(critical["criterion"], critical["site"], strict=True)) == CURVES
    assert set(critical["bar"]) == {0.995, 0.99, 0.98, 0.95}
    values = critical["value"].dropna()
    assert values.between(0, 1).all()
    assert (critical["interval_low"].dropna() <= critical["interval_high"].dropna()).all()
    # Twenty questions settle nothing at one per cent.
    tight = critical[(critical["task"] == "few_pairs") & (critical["bar"] >= 0.99)]
    assert not tight["resolved"].any()
    summary = pd.read_csv(smoke.results / "zoo-small" / "summary.csv")
    pd.testing.assert_frame_equal(summary, critical)


def test_activations_and_metrics(smoke: Checkout) -> None:
    root = zarr.open_group(smoke.results / "zoo-small" / "activations.zarr", mode="r")
    assert root["intermediate/layer_000"].shape == (512, 256)
    assert root["input/layer_000"].shape == (512, 96)
    metrics = table(smoke, "metrics.csv")
    assert set(metrics["tensor"]) == {"input", "intermediate"}
    assert (metrics["tokens"] == 512).all()
    assert (metrics["effective_rank"] > 1).all()
    assert (metrics["effective_rank"] <= metrics["width"]).all()
    layers = table(smoke, "layers.csv")
    error = layers.dropna(subset="output_error")
    assert (error["output_error"] > 0).all()
    shares = table(smoke, "magnitudes.csv").groupby(["model", "tensor"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(1)


def test_top_p_of_everything_is_dense(smoke: Checkout, tmp_path: Path) -> None:
    checkout = smoke.copy(tmp_path / "atlas")
    node = "zoo-small/topp/intermediate/1"
    checkout.run_well(f"results/{node}/eval.json")
    results = {}
    for name in ("zoo-small/dense", node):
        rows = pq.read_table(checkout.results / name / "samples.parquet").to_pylist()
        results[name] = [(row["doc_hash"], row["metrics"], row["nats"]) for row in rows]
    assert len(results[node]) == 40
    assert results[node] == results["zoo-small/dense"]


def test_snakemakes_own_report(smoke: Checkout, tmp_path: Path) -> None:
    checkout = smoke.copy(tmp_path / "atlas")
    done = checkout.run("--report", "report.zip")
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(checkout.path / "report.zip") as archive:
        assert any(name.endswith("report.html") for name in archive.namelist())
        assert any("critical_sparsity" in name for name in archive.namelist())
    shutil.rmtree(checkout.path)
