"""What the stages write of masks, pairs, predictors and local dimensions, on a captured model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsity_atlas.activations import metrics
from sparsity_atlas.activations.dimension import dimension, sample
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.studies import output_error
from sparsity_atlas.studies.mask_table import PREDICTED, QUANTITIES, RECALL, SCHEMA
from tiny_lm import run_stage

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN = 24


def masks(captured: Path, manifest: Path, output: Path, **studies: Any) -> list[dict[str, Any]]:
    run_stage(
        output_error,
        {
            **{"--model": manifest, "--site": "gate", "--levels": "0.5,0.25"},
            **{"--store": captured / "activations.zarr", "--calibration": ""},
            "--criterion": json.dumps({"rule": "topk"}),
            "--settings": json.dumps({"dtype": "auto", "device": "cpu", **studies}),
            **{"--output": output / "sparsity.parquet", "--masks": output / "masks.parquet"},
        },
    )
    return read_parquet(output / "masks.parquet", SCHEMA).to_pylist()


def test_masks_agree_with_the_sparsity_beside_them(
    captured: Path, manifest: Path, tmp_path: Path
) -> None:
    rows = masks(captured, manifest, tmp_path)
    assert {row["quantity"] for row in rows} == set(QUANTITIES)
    shares = read_parquet(tmp_path / "sparsity.parquet", output_error.SCHEMA).to_pylist()
    found = {
        (row["level"], row["layer"]): row["value"]
        for row in rows
        if (row["quantity"], row["at"]) == ("unused", 1)
    }
    assert found == {(row["level"], row["layer"]): pytest.approx(row["sparsity"]) for row in shares}


def test_pairs_and_predictors_where_they_are_asked_for(
    captured: Path, manifest: Path, tmp_path: Path
) -> None:
    rows = masks(captured, manifest, tmp_path, predictors=[2, HIDDEN], coactivation=8)
    own = [row for row in rows if row["quantity"] not in QUANTITIES]
    layers = {row["layer"] for row in rows}
    asked = {"coactivation", "best_partner", *RECALL.values(), *PREDICTED.values()}
    for level in ("0.5", "0.25"):
        for layer in layers:
            here = [row for row in own if (row["level"], row["layer"]) == (level, layer)]
            assert {row["quantity"] for row in here} == asked
            value = {(row["quantity"], row["at"]): row["value"] for row in here}
            assert value["recall_by_weights", HIDDEN] > 0.99
            assert value["recall_by_weights", 2] < value["recall_by_weights", HIDDEN]
            assert value["sparsity_by_weights", 2] == pytest.approx(1 - float(level), abs=0.02)
    assert {(row["part"], row["tensor"]) for row in own} == {("ffn", "gate")}


def test_local_dimensions_where_they_are_asked_for(captured: Path, tmp_path: Path) -> None:
    run_stage(
        metrics,
        {
            **{"--capture": captured / "capture/gate.json", "--points": "120"},
            **{"--store": captured / "activations.zarr", "--output": tmp_path / "gate.parquet"},
        },
    )
    store = ActivationStore(captured / "activations.zarr")
    for row in read_parquet(tmp_path / "gate.parquet", metrics.SCHEMA).to_pylist():
        found = dimension(sample(store.rows("gate", row["layer"]), 120))
        assert (row["lid"], row["lid_geomle"]) == (found.mle, found.geomle)
        assert row["lid"] > 0
