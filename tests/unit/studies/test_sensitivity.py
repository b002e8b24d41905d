"""The stage that sparsifies one layer at a time: its numbers, what it looks at, and what it shows."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fake_results import make_results, make_tables
from mixtures import tiny_mixture
from model_parts import by_tensor, find_ffns
from sparsity_atlas.activations import capture
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.built_in.topk import TopK
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.figures import layer_by_level
from sparsity_atlas.files.journal import whole_lines
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.studies import sensitivity
from sparsity_atlas.studies.sensitivity import numbers, passes, rows
from sparsity_atlas.studies.single_layer import Pass, run, run_alone
from sparsity_atlas.terms import PlaceKey
from tiny_lm import run_stage, sentences

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(0, 50, (12, 12), generator=torch.Generator().manual_seed(0))


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


def added(nats: np.ndarray, more: list[float], zeros: list[int]) -> Pass:
    return Pass(nats + np.array(more), np.array(zeros))


def test_numbers_by_hand() -> None:
    """Twelve sequences of 11 tokens, of which 10 are predicted; vectors of 5 entries."""
    nats = np.array([20.0, 30, 40, 30] * 3)
    dense = added(nats, [0] * 12, [0] * 12)
    mild = added(nats, [1] * 12, [11] * 12)
    harsh = added(nats, [2, 4, 6, 4] * 3, [11, 22, 33, 22] * 3)
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


def test_what_failed_has_no_numbers() -> None:
    one = added(np.array([20.0, 30]), [0, 0], [0, 0])
    for passes_of, dense in (([None, None], one), ([one, one], None)):
        found = list(numbers(passes_of, dense, 11, 5, 200, 0))
        assert [set(row.values()) for row in found] == [{None}] * 2


def test_one_sequence_has_no_interval() -> None:
    nats = np.array([20.0])
    (found,) = numbers([added(nats, [1], [11])], added(nats, [0], [0]), 11, 5, 200, 0)
    assert found["added_loss"] == pytest.approx(0.1)
    assert found["added_loss_low"] is found["added_loss_high"] is None


class Memory:
    """Stands for a journal."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        self.records.append(json.loads(json.dumps(record)))


def measure(ffns: list, site: str, bound: dict, levels: list[str], batch: int = 4) -> list[dict]:
    """The rows of a study of `IDS`."""
    made = passes(ffns, site, bound, levels, IDS, batch, Memory())
    return list(rows(ffns, site, levels, made, IDS.shape[1], 100, 0))


@pytest.mark.parametrize("site", ["input", "intermediate", "all_inputs", "gate"])
def test_one_place_is_sparsified_and_all_else_dense(model: LlamaForCausalLM, site: str) -> None:
    ffns = find_ffns(model)
    bound = bind_all(create({"rule": "topk"}), ffns, site)
    found = measure(ffns, site, bound, ["1", "0.25"])
    assert [(row["layer"], row["tensor"]) for row in found[::2]] == list(by_tensor(bound))
    dense = nats(model)
    for (layer, _, tensor), unchanged, sparse in zip(bound, found[::2], found[1::2], strict=True):
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
    whole, parts = (run_alone(ffns, "input", place, rule, 0.7, IDS, batch) for batch in (12, 5))
    assert whole.zeros.tolist() == parts.zeros.tolist()
    assert whole.nats == pytest.approx(parts.nats)


def test_sequences_of_a_prompt_mask(model: LlamaForCausalLM) -> None:
    """Half of the neurons after the first half of the tokens."""
    ffns = find_ffns(model)
    bound = bind_all(create({"rule": "prompt_mask"}), ffns, "intermediate")
    row, _ = measure(ffns, "intermediate", bound, ["0.5"])
    assert row["sparsity"] == pytest.approx(0.25)


def test_what_is_no_number_at_one_place_fails_there_alone(model: LlamaForCausalLM) -> None:
    class Breaks(TopK):
        def replace(self, values: Any, written: Any, mask: Any, level: float) -> Any:
            return torch.full_like(written, math.nan)

    ffns = find_ffns(model)
    bound = bind_all(TopK(), ffns, "intermediate")
    bound[PlaceKey(0, "ffn", "intermediate")] = Breaks()
    first, second = measure(ffns, "intermediate", bound, ["0.5"])
    assert first["added_loss"] is None
    assert second["added_loss"] is not None


# The stage


@pytest.fixture(scope="module")
def captured(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sequences of a tiny model."""
    folder = tmp_path_factory.mktemp("sensitivity")
    text = folder / "text.jsonl"
    lines = sentences(60, seed=3, shortest=12, longest=20)
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = {"dtype": "auto", "device": "cpu", "text": {"file": str(text)}, "tokens": 160}
    settings |= {"sequence_length": 16, "batch_size": 4, "add_bos_token": None}
    run_stage(
        capture,
        {
            **{"--model": manifest, "--site": "intermediate", "--siblings": "intermediate"},
            **{"--settings": json.dumps(settings), "--store": folder / "activations.zarr"},
            "--output": folder / "capture/intermediate.json",
        },
    )
    return folder


def study(captured: Path, manifest: Path, output: Path, levels: str, **changes: Any) -> list[dict]:
    settings = {"dtype": "auto", "device": "cpu", "replicates": 100, "seed": 0, "batch_size": 4}
    settings |= {"calibration_tokens": 0, **changes}
    run_stage(
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

    monkeypatch.setattr("sparsity_atlas.studies.single_layer.run", watched)
    found = study(captured, manifest, tmp_path / "a.parquet", "0.9,0.5")
    assert [row["level"] for row in found] == ["0.9", "0.5", "0.9", "0.5"]
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


def test_a_killed_study_goes_on_where_it_stood(
    captured: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.parquet"
    study(captured, manifest, whole, "0.9,0.5")
    ran = 0

    def counted(*given: Any, **named: Any) -> Pass:
        nonlocal ran
        if ran == stop:
            raise KeyboardInterrupt
        ran += 1
        return run(*given, **named)

    monkeypatch.setattr("sparsity_atlas.studies.single_layer.run", counted)
    path = tmp_path / "a.parquet"
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        study(captured, manifest, path, "0.9,0.5")
    assert not path.exists()
    assert len(whole_lines(path.with_suffix(".journal"))) == 1 + 3
    ran, stop = 0, -1
    study(captured, manifest, path, "0.9,0.5")
    assert ran == 1 + 2 * 2 - 3
    assert path.read_bytes() == whole.read_bytes()
    assert not path.with_suffix(".journal").exists()


@pytest.mark.parametrize(
    "changes", [{"batch_size": 8}, {"calibration_tokens": 16}, {"levels": "0.9,0.4"}]
)
def test_another_study_begins_anew(
    captured: Path, manifest: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = dict(changes)
    path = tmp_path / "a.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "write_parquet", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study(captured, manifest, path, "0.9,0.5")
    before = path.with_suffix(".journal").read_bytes()
    levels = changes.pop("levels", "0.9,0.5")
    fresh = study(captured, manifest, tmp_path / "b.parquet", levels, **changes)
    assert before
    assert study(captured, manifest, path, levels, **changes) == fresh


@pytest.mark.parametrize(
    ("levels", "message"),
    [("2", "2 is out of range"), ("", "run: sensitivity: no block names levels")],
)
def test_levels_that_are_none(
    captured: Path, manifest: Path, tmp_path: Path, levels: str, message: str
) -> None:
    with pytest.raises(AtlasError, match=message):
        study(captured, manifest, tmp_path / "a.parquet", levels)
    assert not list(tmp_path.iterdir())


def test_damaged_token_ids(captured: Path, manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(captured, folder)
    (chunk,) = (
        path for path in (folder / "activations.zarr/text/ids/c").rglob("*") if path.is_file()
    )
    chunk.unlink()  # Zarr takes it for zeros
    with pytest.raises(AtlasError, match="the token ids are not those of the capture"):
        study(folder, manifest, tmp_path / "a.parquet", "0.5")


# The figure


def test_the_figure_is_layer_by_level(tmp_path: Path) -> None:
    make_results(tmp_path, {"m": {}}, sites=("all_inputs",))
    tables = make_tables(tmp_path)
    figure = layer_by_level.sensitivity(tables)
    titles = [ax.get_title() for ax in figure.axes[:2]]
    assert titles == ["m · topp\nall_inputs: input", "m · topp\nall_inputs: intermediate"]
    panel = figure.axes[0]
    assert [one.get_text() for one in panel.get_xticklabels()] == ["0.97", "0.9", "0.75", "0.5"]
    shown = np.asarray(panel.collections[0].get_array()).reshape(3, 4)
    wanted = tables.sensitivity.query("tensor == 'input'")["added_loss"]
    assert np.sort(shown.ravel()) == pytest.approx(np.sort(wanted.to_numpy()))
    assert (np.diff(shown, axis=0) > 0).all()
    assert (np.diff(shown, axis=1) > 0).all()
    none = replace(tables, sensitivity=tables.sensitivity[:0])
    assert "No run block names" in layer_by_level.sensitivity(none).texts[0].get_text()
    better = replace(tables, sensitivity=tables.sensitivity.assign(added_loss=-0.1))
    assert "No layer by itself" in layer_by_level.sensitivity(better).texts[0].get_text()


def test_parts_of_a_layer_have_panels_of_their_own(tmp_path: Path) -> None:
    make_results(tmp_path, {"m": {}}, sites=("intermediate",))
    tables = make_tables(tmp_path)
    halves = [tables.sensitivity.assign(part=part) for part in ("shared", "experts")]
    figure = layer_by_level.sensitivity(replace(tables, sensitivity=pd.concat(halves)))
    assert [ax.get_title() for ax in figure.axes[:2]] == [
        "m · topp\nintermediate, shared",
        "m · topp\nintermediate, experts",
    ]


def test_rows_say_which_part_they_are_of() -> None:
    """A layer with a shared expert and routed ones has two vectors of that name."""
    model = tiny_mixture("qwen2_moe")
    parts = find_parts(model)
    bound = bind_all(create({"rule": "topk"}), parts, "intermediate")
    ids = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(1))
    made = passes(parts, "intermediate", bound, ["0.5"], ids, 4, Memory())
    found = list(rows(parts, "intermediate", ["0.5"], made, 8, 100, 0))
    places = [(layer, part) for layer in (0, 1) for part in ("shared", "experts")]
    assert [(row["layer"], row["part"]) for row in found] == places
    assert all(row["sparsity"] == pytest.approx(0.5) for row in found)
