"""The stage that sparsifies one layer at a time: its numbers, what it looks at, and what it shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fake_results import make_results, make_tables
from sparsity_atlas import capture, sensitivity
from sparsity_atlas.activations import ActivationStore
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.topk import TopK
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.figures import allocation
from sparsity_atlas.place import bind_all
from sparsity_atlas.sensitivity import measure, numbers
from sparsity_atlas.single_layer import Pass, run, run_alone
from sparsity_atlas.sites import find_ffns
from tiny_lm import sentences

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(0, 50, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    # Weights so large that a layer makes a difference.
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.4)).eval()


def nats(model: torch.nn.Module) -> np.ndarray:
    """Loss of each sequence, summed over its predicted tokens, in float64."""
    with torch.no_grad():
        logits = model(IDS).logits[:, :-1].double()
    rows = zip(logits, IDS[:, 1:], strict=True)
    return np.array([float(F.cross_entropy(*row, reduction="sum")) for row in rows])


def test_numbers_by_hand() -> None:
    """Four sequences of 11 tokens, of which 10 are predicted; vectors of 5 entries."""
    dense = np.array([20.0, 30, 40, 30])
    mild = Pass(dense + 1, np.full(4, 11))
    harsh = Pass(dense + np.array([2.0, 4, 6, 4]), np.array([11, 22, 33, 22]))
    found = list(numbers([mild, None, harsh], dense, 11, 5, 200, 0))
    assert found[0]["sparsity"] == pytest.approx(1 / 5)
    assert found[0]["added_loss"] == pytest.approx(0.1)
    # Every sequence adds the same: nothing is uncertain.
    assert found[0]["added_loss_low"] == pytest.approx(0.1)
    assert found[0]["added_loss_high"] == pytest.approx(0.1)
    assert set(found[1].values()) == {None}
    assert found[2]["sparsity"] == pytest.approx(2 / 5)
    assert found[2]["added_loss"] == pytest.approx(0.4)
    assert 0.2 <= found[2]["added_loss_low"] < 0.4 < found[2]["added_loss_high"] <= 0.6


def test_a_loss_that_is_no_number_has_failed() -> None:
    dense = np.array([20.0, 30])
    broken = Pass(np.array([20.0, math.inf]), np.array([5, 5]))
    (found,) = numbers([broken], dense, 11, 5, 200, 0)
    assert set(found.values()) == {None}


def test_one_sequence_has_no_interval() -> None:
    (found,) = numbers([Pass(np.array([21.0]), np.array([11]))], np.array([20.0]), 11, 5, 200, 0)
    assert found["added_loss"] == pytest.approx(0.1)
    assert found["added_loss_low"] is found["added_loss_high"] is None


@pytest.mark.parametrize("site", ["input", "intermediate", "all_inputs", "gate"])
def test_one_place_is_sparsified_and_all_else_dense(model: LlamaForCausalLM, site: str) -> None:
    ffns = find_ffns(model)
    bound = bind_all(create({"rule": "topk"}), ffns, site)
    with torch.no_grad():
        found = list(measure(ffns, site, bound, ["1", "0.25"], IDS, 100, 0))
    assert [(row["layer"], row["tensor"]) for row in found[::2]] == list(bound)
    dense = nats(model)
    for (layer, tensor), unchanged, sparse in zip(bound, found[::2], found[1::2], strict=True):
        mlp = model.model.layers[layer].mlp

        def forward(x: torch.Tensor, mlp: Any = mlp, tensor: str = tensor) -> torch.Tensor:
            def keep(values: torch.Tensor) -> torch.Tensor:
                least = values.abs().topk(values.shape[-1] // 4).values[..., -1:]
                return torch.where(values.abs() >= least, values, 0)

            x = keep(x) if tensor == "input" else x
            gate = mlp.act_fn(mlp.gate_proj(x))
            gate = keep(gate) if tensor == "gate" else gate
            i = gate * mlp.up_proj(x)
            return mlp.down_proj(keep(i) if tensor == "intermediate" else i)

        own, mlp.forward = mlp.forward, forward
        wanted = (nats(model) - dense).sum() / (IDS.shape[0] * (IDS.shape[1] - 1))
        mlp.forward = own
        assert (unchanged["added_loss"], unchanged["sparsity"]) == (0, 0)
        assert sparse["added_loss"] == pytest.approx(wanted, abs=1e-6)
        assert abs(wanted) > 1e-4
        assert sparse["sparsity"] == pytest.approx(0.75)
        assert sparse["added_loss_low"] < sparse["added_loss"] < sparse["added_loss_high"]


def test_batches_change_nothing(model: LlamaForCausalLM) -> None:
    ffns = find_ffns(model)
    bound = bind_all(create({"rule": "topp"}), ffns, "input")
    place, rule = next(iter(bound.items()))
    with torch.no_grad():
        whole, parts = (
            run_alone(ffns, "input", place, rule, [0.7], IDS, batch)[0] for batch in (6, 4)
        )
    assert whole.zeros.tolist() == parts.zeros.tolist()
    assert whole.nats == pytest.approx(parts.nats)


def test_sequences_of_a_prompt_mask(model: LlamaForCausalLM) -> None:
    """Half of the neurons after the first half of the tokens."""
    ffns = find_ffns(model)
    bound = bind_all(create({"rule": "prompt_mask"}), ffns, "intermediate")
    with torch.no_grad():
        (row, *_) = measure(ffns, "intermediate", bound, ["0.5"], IDS, 100, 0)
    assert row["sparsity"] == pytest.approx(0.25)


def test_what_is_no_number_at_one_place_fails_there_alone(model: LlamaForCausalLM) -> None:
    class Breaks(TopK):
        def replace(self, values: Any, written: Any, mask: Any, level: float) -> Any:
            return torch.full_like(written, math.nan)

    ffns = find_ffns(model)
    bound = bind_all(TopK(), ffns, "intermediate")
    bound[0, "intermediate"] = Breaks()
    with torch.no_grad():
        first, second = measure(ffns, "intermediate", bound, ["0.5"], IDS, 100, 0)
    assert first["added_loss"] is None
    assert second["added_loss"] is not None


# The stage


def stage(module: Any, arguments: dict[str, Any]) -> None:
    """A stage by its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["stage", *(str(one) for pair in arguments.items() for one in pair)]
        )
        module.main()


@pytest.fixture(scope="module")
def captured(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sequences of a tiny model."""
    folder = tmp_path_factory.mktemp("sensitivity")
    text = folder / "text.jsonl"
    lines = sentences(60, seed=3, shortest=12, longest=20)
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = {"dtype": "auto", "device": "cpu", "text": {"file": str(text)}, "tokens": 160}
    settings |= {"sequence_length": 16, "batch_size": 4, "add_bos_token": None}
    stage(
        capture,
        {
            **{"--model": manifest, "--site": "intermediate", "--siblings": "intermediate"},
            **{"--settings": json.dumps(settings), "--store": folder / "activations.zarr"},
            "--output": folder / "capture/intermediate.json",
        },
    )
    return folder


def study(captured: Path, manifest: Path, output: Path, levels: str, **changes: Any) -> list[dict]:
    settings = {"dtype": "auto", "device": "cpu", "replicates": 100, "seed": 0, **changes}
    stage(
        sensitivity,
        {
            **{"--model": manifest, "--site": "intermediate", "--levels": levels},
            **{"--store": captured / "activations.zarr", "--settings": json.dumps(settings)},
            **{
                "--criterion": json.dumps({"rule": "topk"}),
                "--calibration": "",
                "--output": output,
            },
        },
    )
    return pq.read_table(output).to_pylist()


def test_the_stage_leaves_out_what_calibrations_saw(
    captured: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(model: Any, ids: torch.Tensor, *rest: Any, **named: Any) -> Pass:
        seen.append(ids)
        return run(model, ids, *rest, **named)

    monkeypatch.setattr("sparsity_atlas.single_layer.run", watched)
    rows = study(captured, manifest, tmp_path / "a.parquet", "0.9,0.5")
    assert [row["level"] for row in rows] == ["0.9", "0.5", "0.9", "0.5"]
    ids = ActivationStore(captured / "activations.zarr").ids()
    assert all(one.tolist() == ids.tolist() for one in seen)
    seen.clear()
    study(captured, manifest, tmp_path / "b.parquet", "0.9,0.5", calibration_tokens=96)
    assert seen
    assert all(one.tolist() == ids[6:].tolist() for one in seen)


def test_the_same_bytes_again(captured: Path, manifest: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        study(captured, manifest, tmp_path / f"{name}.parquet", "0.5")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_level_out_of_range(captured: Path, manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="2"):
        study(captured, manifest, tmp_path / "a.parquet", "2")
    assert not list(tmp_path.iterdir())


# The figure


def test_the_figure_is_layer_by_level(tmp_path: Path) -> None:
    make_results(tmp_path, {"m": {}}, sites=("all_inputs",))
    tables = make_tables(tmp_path)
    figure = allocation.sensitivity(tables)
    titles = [ax.get_title() for ax in figure.axes[:2]]
    assert titles == ["m · topp\nall_inputs: input", "m · topp\nall_inputs: intermediate"]
    panel = figure.axes[0]
    assert [one.get_text() for one in panel.get_xticklabels()] == ["0.97", "0.9", "0.75", "0.5"]
    shown = np.asarray(panel.collections[0].get_array()).reshape(3, 4)
    rows = tables.sensitivity.query("tensor == 'input'")
    assert np.sort(shown.ravel()) == pytest.approx(np.sort(rows["added_loss"].to_numpy()))
    assert (np.diff(shown, axis=0) > 0).all()
    assert (np.diff(shown, axis=1) > 0).all()
    none = replace(tables, sensitivity=tables.sensitivity[:0])
    assert "No run block names" in allocation.sensitivity(none).texts[0].get_text()
