"""The stage that compares what tells right answers: its numbers, by hand and one by one, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sparsity_atlas.activations.layout import Shape
from sparsity_atlas.activations.point_dimension import point_dimensions
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.samples import SCHEMA as SAMPLES
from sparsity_atlas.evaluation.samples import SampleTable
from sparsity_atlas.files.parquet import read_parquet, write_parquet
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.terms import ACCOUNTS
from sparsity_atlas.truthfulness import own_answers, predictors
from sparsity_atlas.truthfulness.predictors import (
    Outcomes,
    Predictor,
    _picked,
    compared,
    induced_sparsity,
    study,
)
from sparsity_atlas.truthfulness.truth_table import SCHEMA
from tiny_lm import run_stage

SETTINGS = {"neighbours": 8, "replicates": 50, "seed": 3}


def answered(
    folder: Path,
    right: np.ndarray,
    points: dict[tuple[str, int], np.ndarray],
    cluster: list[str | None] | None = None,
    margin: np.ndarray | None = None,
) -> Path:
    """Answers as `own_answers` leaves them."""
    path, count = folder / "answers" / "task.json", len(right)
    logprob = np.random.default_rng(0).standard_normal(count) + right - 3
    table = {
        **{"leaf": ["leaf"] * count, "doc_id": list(range(count))},
        **{"cluster": cluster or [None] * count, "value": right.astype(float)},
        **{"tokens": [1] * count, "logprob": logprob},
        "margin": [None] * count if margin is None else margin,
    }
    write_parquet(path.with_suffix(".parquet"), pa.table(table, own_answers.SCHEMA))
    store = ActivationStore(path.with_suffix(".zarr"), writable=True)
    tensors = {}
    for name in dict.fromkeys(name for name, _ in points):
        own = {layer: values for (one, layer), values in points.items() if one == name}
        shapes = {layer: Shape(1, values.shape[1], 0) for layer, values in own.items()}
        store.create(name, shapes, count, count, "float32")
        sums = [store.put(name, layer, 0, one.astype("float32")) for layer, one in own.items()]
        record = {"fingerprint": "x", "dtype": "float32", "rows": count, "blocks": [sums]}
        store.finish(name, {**record, "layers": list(own)})
        tensors[name] = store.complete(name)
    about = {"status": "ok", "task": "task", "samples": count, "tensors": tensors}
    write_manifest(path, about)
    return path


def pairwise(scores: np.ndarray, right: np.ndarray) -> float:
    won = [(a > b) + (a == b) / 2 for a in scores[right] for b in scores[~right]]
    return float(np.mean(won))


def cloud(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Right answers lie on a line, wrong ones fill a space of eight dimensions."""
    rng = np.random.default_rng(1)
    right = np.arange(count) % 2 == 0
    points = rng.standard_normal((count, 8))
    points[right] = points[right][:, :1] * np.ones(8)
    return right, points


def test_every_number(tmp_path: Path) -> None:
    right, points = cloud()
    noise = np.random.default_rng(2).standard_normal((60, 8))
    margin = np.random.default_rng(3).random(60) + right / 4
    path = answered(
        tmp_path, right, {("residual", 0): noise, ("residual", 1): points}, margin=margin
    )
    rows = study(path, [], SETTINGS)
    found = {(row["predictor"], row.get("layer")): row for row in rows if not row["reason"]}
    assert len(found) == len(rows) == 2 + 2 * 2 + 2
    told = point_dimensions(points.astype("float32").astype(float), 8, 3)
    for name, values in zip(("lid", "lid_geomle"), told, strict=True):
        row = found[name, 1]
        assert row["auroc"] == pytest.approx(pairwise(-values, right))
        assert row["mean_right"] == pytest.approx(values[right].mean())
        assert row["mean_wrong"] == pytest.approx(values[~right].mean())
        assert row["difference"] == pytest.approx(row["auroc"] - pairwise(margin, right))
        assert row["low"] <= row["auroc"] <= row["high"]
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert found["lid", 1]["auroc"] > 0.95
    assert found["lid", 0]["auroc"] < 0.75
    assert found["margin", None]["auroc"] == pytest.approx(pairwise(margin, right))
    assert (found["margin", None]["difference"], found["margin", None]["difference_high"]) == (0, 0)
    # The layer that tells is picked on either half.
    assert found["lid", None]["auroc"] == pytest.approx(found["lid", 1]["auroc"], abs=0.05)
    assert {row["reference"] for row in rows} == {"margin"}
    assert {(row["samples"], row["right"]) for row in rows} == {(60, 30)}


def test_a_layer_is_judged_where_it_was_not_picked() -> None:
    """Of three layers, in two drawings: the first half's best are 1 and 0, in the second .6 and .2."""
    picking = np.array([[0.1, 0.9, 0.3], [0.8, 0.7, np.nan]])
    judging = np.array([[0.5, 0.6, 0.7], [0.2, 0.3, 0.4]])
    assert _picked(picking, judging).tolist() == [0.6, 0.2]


def test_chance_layers_stay_at_chance() -> None:
    """Of twenty layers of noise the best is far from a half, and the picked one is not."""
    rng = np.random.default_rng(7)
    best, picked = [], []
    for _ in range(40):
        outcomes = Outcomes(rng.random(80) < 0.5, None)
        noise = [
            Predictor({"predictor": "lid", "tensor": "input", "layer": i}, rng.random(80), -1)
            for i in range(20)
        ]
        rows = list(compared(outcomes, noise, "task", 1, 0))
        best.append(max(row["auroc"] for row in rows if row.get("layer") is not None))
        picked += [row["auroc"] for row in rows if row.get("layer") is None]
    assert np.mean(best) > 0.6
    assert np.mean(picked) == pytest.approx(0.5, abs=0.03)


def test_clusters_stay_together_in_a_half() -> None:
    outcomes = Outcomes(np.arange(40) % 3 > 0, np.arange(40) // 4)
    first = outcomes.halves(5)
    assert {tuple(first[i : i + 4]) for i in range(0, 40, 4)} == {(True,) * 4, (False,) * 4}
    assert first.sum() == 20


@pytest.mark.parametrize(
    ("right", "cluster", "reason"),
    [
        ([True] * 30, None, "all 30 answers are right"),
        ([False] * 30, None, "all 30 answers are wrong"),
        ([True] * 30 + [False] * 9, None, "9 answers that are wrong, 10 are needed"),
        ([True] * 9 + [False] * 30, None, "9 answers that are right, 10 are needed"),
        (
            [True, False] * 30,
            [str(i // 20) for i in range(60)],
            "3 clusters with an answer that are right, 10 are needed",
        ),
    ],
)
def test_too_little_to_tell(
    tmp_path: Path, right: list[bool], cluster: list[str] | None, reason: str
) -> None:
    path = answered(tmp_path, np.array(right), {("input", 0): np.eye(len(right))}, cluster)
    assert study(path, [], SETTINGS) == [
        {"reason": reason, "samples": len(right), "right": sum(right)}
    ]


def test_too_few_different_vectors(tmp_path: Path) -> None:
    right, points = cloud()
    path = answered(tmp_path, right, {("input", 0): points, ("input", 1): points[:, :1] > 0})
    rows = study(path, [], SETTINGS)
    said = {row["reason"] for row in rows if row.get("layer") == 1}
    assert said == {"2 different points, 34 are needed for 8 neighbours"}
    assert {row["reason"] for row in rows if row.get("layer") == 0} == {""}


def test_a_task_that_failed_says_why(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "task.json"
    write_manifest(path, {"status": "failed", "reason": "NaN", "tensors": {}})
    assert study(path, [], SETTINGS) == [{"reason": "NaN", "samples": 0, "right": 0}]


def test_another_store_is_refused(tmp_path: Path) -> None:
    right, points = cloud()
    path = answered(tmp_path, right, {("input", 0): points})
    store = ActivationStore(path.with_suffix(".zarr"), writable=True)
    store.finish("input", {"fingerprint": "other"})
    with pytest.raises(
        AtlasError, match=r"not what .*task.json tells of; delete both and run again"
    ):
        study(path, [], SETTINGS)


def node(folder: Path, count: int, status: str = "ok", copies: Collection[int] = ()) -> Path:
    """A node whose samples have 10 tokens each, of 4 entries in either layer; of sample i 2 i zeros.

    All requests of the samples `copies` run the tokens of another, with which they are counted.
    """

    def counted(name: str, i: int) -> bool:
        return name == "unique" or (name == "scoring" and i not in copies)

    tokens = {f"{name}_tokens": [10 * counted(name, i) for i in range(count)] for name in ACCOUNTS}
    zeros = {
        f"{name}_zeros": [
            [i * counted(name, i)] * 2 if name in ("scoring", "unique") else []
            for i in range(count)
        ]
        for name in ACCOUNTS
    }
    plain: dict[str, Any] = {
        **{"task": ["task"] * count, "leaf": ["leaf"] * count},
        # In another order than the answers.
        "doc_id": list(range(count))[::-1],
        **{"doc_hash": ["x"] * count, "cluster": [None] * count, "metrics": [[]] * count},
        **dict.fromkeys(("nats",), [0.0] * count),
        **dict.fromkeys(("predicted", "cut_tokens", "unfinished", "windows"), [0] * count),
    }
    result = {"status": status, "reason": "NaN"}
    table = SampleTable([["input", 0, 4], ["input", 1, 4]])
    table.tasks["task"] = {"fingerprint": "x", "result": result}
    table.rows["task"] = pa.table({**plain, **tokens, **zeros}, SAMPLES)
    table.write(folder / "samples.parquet")
    write_manifest(folder / "eval.json", {"tasks": {"task": result}})
    return folder


def test_sparsity_of_each_sample(tmp_path: Path) -> None:
    right, points = cloud()
    path = answered(tmp_path, right, {("input", 0): points})
    folder = node(tmp_path / "topp" / "input" / "0.9", 60)
    run_stage(
        predictors,
        {
            **{"--answers": path, "--nodes": folder / "eval.json"},
            **{"--settings": json.dumps(SETTINGS), "--output": tmp_path / "task.parquet"},
        },
    )
    rows = read_parquet(tmp_path / "task.parquet", SCHEMA).to_pylist()
    (own,) = [row for row in rows if row["predictor"] == "sparsity"]
    shares = 2 * np.arange(60)[::-1] / 80
    assert own["node"] == "topp/input/0.9"
    assert own["auroc"] == pytest.approx(pairwise(shares, right))
    assert own["mean_right"] == pytest.approx(shares[right].mean())


def test_samples_that_are_counted_with_another_are_left_out_beside_what_they_are_compared_with(
    tmp_path: Path,
) -> None:
    right, points = cloud()
    margin = np.random.default_rng(3).random(60) + right / 4
    path = answered(tmp_path, right, {("input", 0): points}, margin=margin)
    copies = {4, 7, 8, 31}
    folder = node(tmp_path / "topp" / "input" / "0.9", 60, copies=copies)
    name = "topp/input/0.9"
    (own,) = [row for row in study(path, [(name, folder)], SETTINGS) if row.get("node") == name]
    there = np.array([59 - i not in copies for i in range(60)])
    shares = 2 * np.arange(60)[::-1][there] / 80
    beside = pairwise(margin[there], right[there])
    assert own["reason"] == ""
    assert (own["samples"], own["right"]) == (56, right[there].sum())
    assert own["auroc"] == pytest.approx(pairwise(shares, right[there]))
    assert own["mean_wrong"] == pytest.approx(shares[~right[there]].mean())
    assert own["difference"] == pytest.approx(own["auroc"] - beside)
    assert own["low"] <= own["auroc"] <= own["high"]
    # With most of them left out nothing is told.
    few = node(tmp_path / "few" / "input" / "0.9", 60, copies=range(45))
    rows = study(path, [("few/input/0.9", few)], SETTINGS)
    (none,) = [row for row in rows if row.get("node") == "few/input/0.9"]
    assert none["reason"] == "45 samples have none: 8 answers that are right, 10 are needed"
    assert none.get("auroc") is None


def test_a_node_without_numbers_says_why(tmp_path: Path) -> None:
    samples = pa.table({"leaf": ["leaf"] * 5, "doc_id": list(range(5))})
    failed = node(tmp_path / "a" / "input" / "0.9", 5, status="failed")
    assert induced_sparsity(failed, "a/input/0.9", "task", samples).reason == "NaN"
    short = node(tmp_path / "b" / "input" / "0.9", 3)
    assert induced_sparsity(short, "b/input/0.9", "task", samples).reason == (
        "2 samples are not there"
    )
