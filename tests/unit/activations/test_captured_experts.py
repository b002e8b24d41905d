"""What is captured of mixtures of experts, against a plain loop over tokens and experts."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkout import ROOT
from mixtures import EACH, EXPERTS, HIDDEN, first_projection, save_mixture
from sparsity_atlas.activations import capture as stage
from sparsity_atlas.activations import expert_rows, metrics, store
from sparsity_atlas.activations.layout import groups
from sparsity_atlas.activations.metrics import layer_metrics
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.criteria import create
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.sites.experts.mixture import Experts
from sparsity_atlas.sites.find import bind_parts
from sparsity_atlas.sparsify.attach import sparsified
from sparsity_atlas.studies import output_error
from tiny_lm import run_stage, sentences, write_model_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, TOKENS = 8, 100  # rounded up to 13 sequences
SEQUENCES = 13


def _swish(z: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = z.chunk(2, -1)
    return up, gate * torch.sigmoid(gate)


def _interleaved(z: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
    return up + 1, gate * torch.sigmoid(1.702 * gate)


# How u and g come of the first projection; ungated: what comes of it.
FACTORS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "olmoe": _swish,
    "gpt_oss": _interleaved,  # transposed, with biases
    "nemotron_h": lambda z: (torch.relu(z) ** 2,),
    "qwen2_moe": _swish,  # with a shared expert
    "deepseek_v3": _swish,  # with a dense layer before
}


# Layers of other kinds than these have no part beside attention.
CHANGES = {"nemotron_h": {"layers_block_type": ["moe", "moe"], "num_hidden_layers": 2}}


class Work(NamedTuple):
    """A model, a text and a folder of results."""

    family: str
    model: Path
    manifest: Path
    text: Path
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "activations.zarr"

    @property
    def sites(self) -> str:
        return ",".join(read_manifest(self.manifest)["sites"])


def made(family: str, folder: Path) -> Work:
    model = save_mixture(folder / "model", family, **CHANGES.get(family, {}))
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(40)))
    manifest = write_model_manifest(model, folder / "model.json")
    return Work(family, model, manifest, text, folder / "results")


@pytest.fixture(scope="module", params=FACTORS)
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """All sites of a family's model, in several chunks. Leave it as it is."""
    work = made(request.param, tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 2 * LENGTH * EACH * 48 * 4)
        for site in work.sites.split(","):
            capture(work, site)
    return work


def capture(work: Work, site: str, **changes: Any) -> dict[str, Any]:
    settings = {
        **{"dtype": "auto", "device": "cpu", "text": {"file": str(work.text)}},
        **{"tokens": TOKENS, "sequence_length": LENGTH, "batch_size": 4, "add_bos_token": None},
        **changes,
    }
    output = work.folder / "capture" / f"{site}.json"
    arguments = {
        **{"--model": work.manifest, "--site": site, "--siblings": work.sites},
        **{"--settings": json.dumps(settings), "--store": work.store, "--output": output},
        "--code": "test",
    }
    run_stage(stage, arguments)
    return read_manifest(output)


class Passed(NamedTuple):
    """What one experts module was called with, of all tokens."""

    module: Any
    x: Tensor
    index: Tensor
    weights: Tensor


def calls(work: Work) -> list[Passed]:
    """Of each experts module, by a hook on it in a plain model, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(work.model).eval()
    found: dict[str, list[Passed]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "has_gate"):

            def note(module: Any, args: Any, kwargs: Any, path: str = path) -> None:
                given = (*args, *kwargs.values())
                found.setdefault(path, []).append(Passed(module, *(one.clone() for one in given)))

            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for row in ActivationStore(work.store).ids():
            model(torch.from_numpy(row)[None], use_cache=False)
    return [
        Passed(own[0].module, *(torch.cat([one[field] for one in own]) for field in (1, 2, 3)))
        for own in found.values()
    ]


def test_rows_are_those_of_a_plain_loop(captured: Work) -> None:
    """Every tensor of every expert at its token's place, in the order of the token's routing."""
    stored = ActivationStore(captured.store)
    layers = stored.layers("experts.index")
    factors = FACTORS[captured.family]
    for layer, (module, x, index, weights) in zip(layers, calls(captured), strict=True):
        assert np.array_equal(stored.read("experts.index", layer), index.numpy())
        for name, values in (("input", x), ("weights", weights)):
            found = torch.from_numpy(stored.read(f"experts.{name}", layer))
            torch.testing.assert_close(found, values.float(), rtol=1e-4, atol=1e-5)
        rows: dict[str, list[Tensor]] = {"up": [], "gate": [], "intermediate": []}
        with torch.no_grad():
            for token, experts in enumerate(index.tolist()):
                for expert in experts:
                    z = first_projection(module, expert, x[token])
                    made = factors(z)
                    for name, values in zip(
                        ("up", "gate"), made[: len(made) // 2 * 2], strict=False
                    ):
                        rows[name].append(values)
                    rows["intermediate"].append(torch.stack(made).prod(0))
        for name, expected in rows.items():
            if expected:
                found = torch.from_numpy(stored.read(f"experts.{name}", layer)).double()
                torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-5)
            else:
                assert f"experts.{name}" not in stored.root


def test_layout(captured: Work) -> None:
    """Arrays of a part stand at its layers; what a dense model has keeps its names."""
    stored = ActivationStore(captured.store)
    described = read_manifest(captured.manifest)["ffn"]
    layers = {
        name: [one["layer"] for one in described if one.get("part", "ffn") == name]
        for name in ("ffn", "shared", "experts")
    }
    assert stored.layers("experts.intermediate") == layers["experts"]
    for name, group in (("ffn", "intermediate"), ("shared", "shared.intermediate")):
        assert (group in stored.root) == bool(layers[name])
        assert not layers[name] or stored.layers(group) == layers[name]
    for layer in layers["experts"]:
        rows = stored.rows("experts.intermediate", layer)
        assert (rows.shape[0], rows.each) == (SEQUENCES * LENGTH * EACH, EACH)
        assert rows.chunk % (EACH * LENGTH) == 0
        assert rows.shape[0] > rows.chunk
        assert stored.shape("experts.input", layer) == (SEQUENCES * LENGTH, HIDDEN)
        index = stored.root[f"experts.index/layer_{layer:03d}"]
        assert (index.dtype, index.shape) == ("int32", (SEQUENCES * LENGTH, EACH))
        assert stored.rows("experts.index", layer).experts == EXPERTS
        weights = stored.root[f"experts.weights/layer_{layer:03d}"]
        assert (weights.dtype, weights.shape) == ("float32", (SEQUENCES * LENGTH, EACH))
    for name in groups(described, captured.sites.split(",")):
        stored.check(name)


def test_batch_size_changes_rounding_only(captured: Work, tmp_path: Path) -> None:
    alone = captured._replace(folder=tmp_path / "alone")
    capture(alone, "intermediate", batch_size=1)
    one, four = ActivationStore(alone.store), ActivationStore(captured.store)
    for name in groups(read_manifest(captured.manifest)["ffn"], captured.sites.split(",")):
        assert one.layers(name) == four.layers(name)
        for layer in one.layers(name):
            np.testing.assert_allclose(
                one.read(name, layer), four.read(name, layer), rtol=1e-4, atol=1e-5
            )


def test_rows_of_an_expert(captured: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = ActivationStore(captured.store)
    monkeypatch.setattr(expert_rows, "BLOCK_BYTES", 1)
    layer, stop = stored.layers("experts.index")[0], 50
    index = stored.read("experts.index", layer)
    assert expert_rows.loads(stored, layer) == [int((index == e).sum()) for e in range(EXPERTS)]
    for tensor in ("input", "intermediate"):
        values = stored.read(f"experts.{tensor}", layer)
        by_hand = [
            [
                values[token if tensor == "input" else token * EACH + place]
                for token in range(stop)
                for place in range(EACH)
                if index[token, place] == expert
            ]
            for expert in range(EXPERTS)
        ]
        for held in (1, 2**30):
            monkeypatch.setattr(expert_rows, "HELD_BYTES", held)
            found = dict(expert_rows.of_experts(stored, tensor, layer, range(EXPERTS), stop))
            for expert, rows in enumerate(by_hand):
                assert len(found[expert]) == len(rows)
                assert not rows or np.array_equal(found[expert], np.stack(rows))
        read = list(expert_rows.blocks(stored, tensor, layer))
        assert len(read) > 2
        experts = np.concatenate([one.experts for one in read])
        assert np.array_equal(experts, index.ravel())
        rows = np.concatenate([one.values for one in read])
        assert np.array_equal(rows, values.repeat(len(rows) // len(values), axis=0))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_interrupted_and_resumed(
    family: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 2 * LENGTH * EACH * 48 * 4)
    work = made(family, tmp_path)
    whole = work._replace(folder=tmp_path / "whole")
    append = stage.Journal.append

    def interrupted(journal: Any, record: Any) -> None:
        if len(journal.records) == blocks:
            raise Interrupted
        append(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Journal, "append", interrupted)
        with pytest.raises(Interrupted):
            capture(work, "all_inputs")
    for one in (work, whole):
        capture(one, "all_inputs")
    contents = [
        {
            str(path.relative_to(one.folder)): path.read_bytes()
            for path in one.folder.rglob("*")
            if path.is_file()
        }
        for one in (work, whole)
    ]
    assert contents[0] == contents[1]
    assert any(name.startswith("activations.zarr/experts.weights/") for name in contents[0])


@pytest.mark.parametrize("name", ["experts.intermediate", "experts.index", "experts.weights"])
def test_a_damaged_array_is_found(captured: Work, tmp_path: Path, name: str) -> None:
    copy = captured._replace(folder=tmp_path)
    capture(copy, "intermediate")
    stored = ActivationStore(copy.store, writable=True)
    layer = stored.layers(name)[-1]
    stored.check(name)
    values = np.asarray(stored.root[f"{name}/layer_{layer:03d}"])
    values[-1, -1] += 1
    stored.root[f"{name}/layer_{layer:03d}"][:] = values
    with pytest.raises(AtlasError, match=rf"'{name}', layer {layer}, tokens from [\d,]+ on"):
        stored.check(name)
    del stored.root[f"{name}/layer_{layer:03d}"]
    with pytest.raises(AtlasError, match="damaged activation store"):
        stored.check(name)


def table(work: Work, module: Any, path: Path, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    run_stage(module, {**arguments, "--store": work.store, "--output": path})
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_metrics_are_those_of_each_experts_rows(
    captured: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert by itself; of those with too few rows how many there are."""
    stored = ActivationStore(captured.store)
    layer = stored.layers("experts.index")[-1]
    loads = expert_rows.loads(stored, layer)
    least = sorted(loads)[1]
    monkeypatch.setattr(metrics, "LEAST_ROWS", least)
    manifest = captured.folder / "capture" / "all_inputs.json"
    rows = table(captured, metrics, tmp_path / "m.parquet", {"--capture": manifest})
    index = stored.read("experts.index", layer)
    for tensor in ("input", "intermediate"):
        values = stored.read(f"experts.{tensor}", layer)
        own = [row for row in rows if (row["tensor"], row["layer"]) == (tensor, layer)]
        own = [row for row in own if row["part"] == "experts"]
        assert [row["expert"] for row in own] == list(range(EXPERTS))
        for expert, row in enumerate(own):
            chosen = [
                values[token if tensor == "input" else token * EACH + place]
                for token, place in zip(*np.nonzero(index == expert), strict=True)
            ]
            assert row["tokens"] == len(chosen) == loads[expert]
            expected = layer_metrics(np.stack(chosen)) if len(chosen) >= least else None
            for name in metrics.SCHEMA.names[4:]:
                found = row[name]
                assert found == (None if expected is None else expected.get(name))
    beside = [row for row in rows if row["part"] != "experts"]
    assert all(row["expert"] is None for row in beside)
    for row in beside:
        group = f"shared.{row['tensor']}" if row["part"] == "shared" else row["tensor"]
        expected = layer_metrics(stored.read(group, row["layer"]))
        assert {name: row[name] for name in expected} == expected


def test_output_error_by_a_plain_loop(captured: Work, tmp_path: Path) -> None:
    """Of routed experts with half of each u ⊙ g dropped, and of the layer with all of its parts."""
    rows = table(
        captured,
        output_error,
        tmp_path / "s.parquet",
        {
            **{"--model": captured.manifest, "--site": "intermediate"},
            **{"--criterion": json.dumps({"rule": "topk"}), "--levels": "0.5,1"},
            "--settings": json.dumps({"dtype": "auto", "device": "cpu"}),
        },
    )
    layers = ActivationStore(captured.store).layers("experts.index")
    described = read_manifest(captured.manifest)["ffn"]
    factors = FACTORS[captured.family]
    for layer, (module, x, index, weights) in zip(layers, calls(captured), strict=True):
        dense, sparse = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            for token, experts in enumerate(index.tolist()):
                for place, expert in enumerate(experts):
                    i = torch.stack(factors(first_projection(module, expert, x[token]))).prod(0)
                    kept = i.abs().topk(len(i) // 2).values[-1]
                    for out, values in ((dense, i), (sparse, i.where(i.abs() >= kept, 0))):
                        made = second(module, expert, values)
                        out[token] += made * weights[token, place].double()
        error = float(((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())
        row = next(row for row in rows if (row["layer"], row["level"]) == (layer, "0.5"))
        parts = {one["part"]: one for one in row["parts"]}
        assert parts["experts"]["error"] == pytest.approx(error, rel=1e-3)
        assert list(parts) == [one.get("part", "ffn") for one in described if one["layer"] == layer]
        assert row["error"] == pytest.approx(np.mean([one["error"] for one in parts.values()]))
        whole = next(row for row in rows if (row["layer"], row["level"]) == (layer, "1"))
        assert whole["error"] == pytest.approx(0, abs=1e-6)


def test_intervals_of_single_experts(captured: Work) -> None:
    """The example: zeros of top-p by a plain loop, and an interval around each share."""
    example: Any = runpy.run_path(str(ROOT / "examples/expert_sparsity.py"))
    stored = ActivationStore(captured.store)
    counts = example["counted"](stored, 0.8)
    for layer in stored.layers("experts.intermediate"):
        index = stored.read("experts.index", layer)
        rows = stored.read("experts.intermediate", layer).astype(np.float64)
        zeros = np.zeros((EXPERTS, SEQUENCES))
        for place, (row, expert) in enumerate(zip(rows, index.ravel(), strict=True)):
            order = np.sort(np.abs(row))[::-1]
            reached = int((order.cumsum() < 0.8 * order.sum()).sum())
            kept = np.abs(row) >= order[min(reached, len(order) - 1)]
            zeros[expert, place // EACH // LENGTH] += (~kept | (row == 0)).sum()
        for expert in range(EXPERTS):
            assert np.array_equal(counts[layer, expert][0], zeros[expert])
            entries = counts[layer, expert][1].sum()
            assert entries == (index == expert).sum() * rows.shape[1]
    found = example["table"](counts, 200)
    described = read_manifest(captured.manifest)["ffn"]
    dense = sum(one.get("part", "ffn") == "ffn" for one in described)
    assert len(found) == dense + EXPERTS * len(stored.layers("experts.intermediate"))
    assert (found["low"] <= found["sparsity"]).all()
    assert (found["sparsity"] <= found["high"]).all()


def second(module: Any, expert: int, values: Tensor) -> Tensor:
    weight = module.down_proj[expert].double()
    made = values @ (weight if module.is_transposed else weight.T)
    return made + module.down_proj_bias[expert].double() if module.has_bias else made


@pytest.mark.parametrize("site", ["input", "intermediate"])
def test_output_error_of_rules_that_differ_by_expert(
    captured: Work, tmp_path: Path, site: str
) -> None:
    """What a rule weighs by each expert's own columns makes of the output, as in a pass of the model."""
    levels = {"0.5": 0.5, "1": 1.0}
    rows = table(
        captured,
        output_error,
        tmp_path / "s.parquet",
        {
            **{"--model": captured.manifest, "--site": site},
            **{"--criterion": json.dumps({"rule": "wina"}), "--levels": ",".join(levels)},
            "--settings": json.dumps({"dtype": "auto", "device": "cpu"}),
        },
    )
    model = AutoModelForCausalLM.from_pretrained(captured.model).eval()
    parts = bind_parts(model, read_manifest(captured.manifest)["ffn"])
    ids = torch.from_numpy(ActivationStore(captured.store).ids())
    # The first layer with experts reads the same with and without what is dropped in it.
    experts = next(part for part in parts if isinstance(part, Experts))
    outputs: list[Tensor] = []
    hook = experts.routed.module.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        model(ids, use_cache=False)
        with sparsified(model, [experts], site, create({"rule": "wina"}), 0.5) as counter:
            counter.expect(torch.ones_like(ids, dtype=torch.bool))
            model(ids, use_cache=False)
            zeros = int(counter.take()[0].sum())
    hook.remove()
    dense, sparse = (out.flatten(0, -2).double() for out in outputs)
    error = float(((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())
    found = next(
        one
        for row in rows
        if (row["layer"], row["level"]) == (experts.layer, "0.5")
        for one in row["parts"]
        if one["part"] == "experts"
    )
    assert found["error"] == pytest.approx(error, rel=1e-3)
    width = experts.routed.hidden if site == "input" else experts.routed.width
    assert found["sparsity"] == pytest.approx(zeros / (ids.numel() * EACH * width), abs=1e-6)
    assert all(row["error"] == pytest.approx(0, abs=1e-6) for row in rows if row["level"] == "1")
