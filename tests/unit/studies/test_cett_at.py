"""CETT at given thresholds, neuron by neuron."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model_parts import find_ffns
from sparsity_atlas.activations.layout import Shape
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.studies import cett_at
from sparsity_atlas.studies.cett_at import cett_rows
from tiny_models import tiny_model


@pytest.mark.parametrize("first", [0, 4])
def test_neuron_by_neuron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    ffn = find_ffns(tiny_model("llama"))[0]
    x = torch.randn(12, ffn.hidden, generator=torch.Generator().manual_seed(0))
    store = ActivationStore(tmp_path / "store.zarr", writable=True)
    store.put_ids(np.zeros((3, 4), dtype=np.int64))
    store.create("input", {ffn.layer: Shape(1, ffn.hidden)}, 12, 4, "float32")
    store.put("input", ffn.layer, 0, x.numpy())
    monkeypatch.setattr(cett_at, "BLOCK_BYTES", 4 * ffn.width * 5)
    with torch.no_grad():
        values = ffn.recompute({"input": x}, "intermediate").double().numpy()[first:]
        weight = ffn.down.module.weight.double().numpy()
        norms = [
            np.linalg.norm(values[token][:, None] * weight.T, axis=1)
            for token in range(len(values))
        ]
        thresholds = [0.0, float(np.quantile(norms, 0.3)), float(np.quantile(norms, 0.8)), 1e9]
        found = {
            (row["quantity"], row["at"]): row["value"]
            for row in cett_rows(ffn, store, thresholds, first)
        }
    for epsilon in thresholds:
        errors, shares = [], []
        for token, size in zip(values, norms, strict=True):
            own = np.where(size < epsilon, token, 0)
            errors.append(np.linalg.norm(weight @ own) / np.linalg.norm(weight @ token))
            shares.append((size < epsilon).mean())
        assert found["cett", epsilon] == pytest.approx(np.mean(errors), abs=1e-5)
        assert found["cett_sparsity", epsilon] == pytest.approx(np.mean(shares))
    assert (found["cett", 0.0], found["cett_sparsity", 0.0]) == (0, 0)
    assert found["cett", 1e9] == pytest.approx(1, abs=1e-5)
