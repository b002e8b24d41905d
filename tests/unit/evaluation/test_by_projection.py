"""Maps that read one vector, each with a mask of its own: against hooks by hand, and in counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from sparsity_atlas.activations import capture
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.calibrate import allocation, calibrate
from sparsity_atlas.criteria.calibration_file import Calibration, read_calibration
from sparsity_atlas.curves.curve import all_samples, build, equal_of, parameter_sparsity
from sparsity_atlas.curves.node_samples import NodeSamples
from sparsity_atlas.curves.phases import phase_rows
from sparsity_atlas.curves.points import estimate_all
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.studies import output_error
from sparsity_atlas.terms import TENSORS
from tiny_lm import (
    CHOICE,
    GENERATION,
    choice_documents,
    open_session,
    rolling_documents,
    run_stage,
    save_model,
    sentences,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SITE = "all_linear_inputs@projections"
MAPS = {
    "q_input": "self_attn.q_proj",
    "k_input": "self_attn.k_proj",
    "v_input": "self_attn.v_proj",
    "o_input": "self_attn.o_proj",
    "up_input": "mlp.up_proj",
    "gate_input": "mlp.gate_proj",
    "intermediate": "mlp.down_proj",
}
TOKENS, LENGTH, SEEN = 128, 16, 96


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two keys and values for four queries, and columns of unlike norms in each map."""
    folder = tmp_path_factory.mktemp("models")
    path = save_model(folder / "llama", num_key_value_heads=2, num_attention_heads=4)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in MAPS.values():
                weight = layer.get_submodule(name).weight
                weight *= torch.rand(weight.shape[1], generator=generator) * 8
    model.save_pretrained(path)
    return write_model_manifest(path, folder / "model.json")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "choice": write_task(folder, "choice", choice_documents(6), **CHOICE),
        "text": write_task(folder, "text", rolling_documents(4, 4), **GENERATION),
    }


@pytest.fixture(scope="module")
def session(manifest: Path, tasks: dict[str, Any]) -> Session:
    return open_session(manifest, tasks)


def layers_of(session: Session) -> Any:
    model: Any = session.lm.model
    return model.model.layers


def logits(session: Session, node: Node | None) -> Tensor:
    ids = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0))
    model: Any = session.lm.model
    with torch.no_grad(), session.attach(node):
        return model(ids, use_cache=False).logits


def by_hand(session: Session, kept: Any) -> Tensor:
    """Each map's own input masked token by token, in a loop over float64 scores.

    `kept` gives, of a layer's number, a tensor's name and a token's float64 vector, the indices that stay.
    """
    handles = []
    for number, layer in enumerate(layers_of(session)):
        for tensor, path in MAPS.items():

            def hook(
                module: nn.Module, args: tuple[Tensor], number: int = number, tensor: str = tensor
            ) -> Tensor:
                (x,) = args
                out = torch.zeros_like(x)
                for row in range(x.shape[0]):
                    for token in range(x.shape[1]):
                        own = kept(number, tensor, x[row, token].double())
                        out[row, token, own] = x[row, token, own]
                return out

            handles.append(layer.get_submodule(path).register_forward_pre_hook(hook))
    try:
        return logits(session, None)
    finally:
        for handle in handles:
            handle.remove()


def test_weighted_scores_are_by_each_map_s_own_columns(session: Session) -> None:
    norms = {
        (number, tensor): layer.get_submodule(path).weight.double().norm(dim=0)
        for number, layer in enumerate(layers_of(session))
        for tensor, path in MAPS.items()
    }

    def kept(number: int, tensor: str, vector: Tensor) -> Tensor:
        scores = vector.abs() * norms[number, tensor]
        return scores.argsort(descending=True)[: len(vector) // 2]

    found = logits(session, Node.make({"rule": "wina"}, SITE, "0.5"))
    torch.testing.assert_close(found, by_hand(session, kept), rtol=1e-5, atol=1e-5)
    together = logits(session, Node.make({"rule": "wina"}, "all_linear_inputs", "0.5"))
    assert not torch.allclose(found, together, atol=1e-3)


@pytest.mark.parametrize("site", ["qkv_input", "input", "all_linear_inputs"])
def test_equal_masks_are_those_of_the_whole(session: Session, site: str) -> None:
    """Top-k looks at the vector alone, which all maps share."""
    whole, split = (
        logits(session, Node.make({"rule": "topk"}, one, "0.4"))
        for one in (site, f"{site}@projections")
    )
    assert torch.equal(whole, split)


def test_counts_are_by_map(session: Session, tmp_path: Path) -> None:
    rule = {"rule": "topk"}
    site = "qkv_input"
    whole = evaluate_node(session, Node.make(rule, site, "0.4"), tmp_path / "whole")
    split = evaluate_node(
        session, Node.make(rule, f"{site}@projections", "0.4"), tmp_path / "split"
    )
    attention = layers_of(session)[0].self_attn
    for task in ("choice", "text"):
        (one,) = whole["tasks"][task]["sparsity"].values()
        three = split["tasks"][task]["sparsity"]
        assert set(three) == {"q_input", "k_input", "v_input"}
        for name, module in zip("qkv", ("q_proj", "k_proj", "v_proj"), strict=True):
            own = three[f"{name}_input"]
            made = attention.get_submodule(module).out_features
            assert own["outputs"] == [made, made]
            assert (own["entries"], own["zeros"]) == (one["entries"], one["zeros"])
            assert own["products"] == own["entries"] * made
        # What a kernel could leave out is the same, since the masks are.
        assert sum(own["products"] for own in three.values()) == one["products"]
        assert sum(own["zero_products"] for own in three.values()) == one["zero_products"]
        assert split["tasks"][task]["scores"] == whole["tasks"][task]["scores"]
    nodes = [
        NodeSamples(tmp_path / name, at)
        for name, at in (("whole", site), ("split", f"{site}@projections"))
    ]
    assert nodes[0].weights("choice") == nodes[1].weights("choice")
    shares = [
        parameter_sparsity(node, "choice", at)
        for node, at in zip(nodes, (site, f"{site}@projections"), strict=True)
    ]
    assert shares[0] == shares[1]
    # The dense model's slots are those of the whole vector.
    evaluate_node(session, None, tmp_path / "dense")
    dense = NodeSamples(tmp_path / "dense", f"{site}@projections")
    rows = dense.rows("choice")
    assert dense.entries(rows).sum() == nodes[0].entries(nodes[0].rows("choice")).sum()


def test_a_curve_is_that_of_the_same_masks_on_the_whole(session: Session, tmp_path: Path) -> None:
    """Over entries, over parameters, and by phase."""
    evaluate_node(session, None, tmp_path / "dense")
    settings = {"seed": 0, "replicates": 100, "bars": [0.99]}
    settings["tasks"] = {"choice": {}, "text": {}}
    found = []
    for site in ("qkv_input", "qkv_input@projections"):
        nodes = {}
        for level in ("0.6", "0.3"):
            folder = tmp_path / site / level
            evaluate_node(session, Node.make({"rule": "topk"}, site, level), folder)
            nodes[level] = NodeSamples(folder, site)
        base = NodeSamples(tmp_path / "dense", site)
        for of in ("entries", "parameters"):
            samples = all_samples(base, nodes, settings, of)
            found.append([one.zeros / one.entries for one in samples])
        samples = all_samples(base, nodes, settings)
        estimates = estimate_all(samples, 100, 0)
        curve = build(base, nodes, samples, estimates, settings, site)
        found.append(equal_of(base, nodes, samples, estimates, settings))
        points = [
            {key: row[key] for key in ("level", "task", "phase", "sparsity", "parameter_sparsity")}
            for row in phase_rows(samples[1], base, nodes, 100, 0)
        ]
        found.append((points, curve["weights"], [row["sparsity"] for row in curve["points"]]))
    half = len(found) // 2
    for whole, split in zip(found[:2], found[half : half + 2], strict=True):
        for one, other in zip(whole, split, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)
    # Queries have more outputs than keys, so that parameters are counted by themselves, to the same end.
    assert {row["sparsity_of"] for row in found[half + 2]} == {"entries", "parameters"}
    assert found[3] == found[half + 3]


def test_batches_change_nothing(manifest: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        session = open_session(manifest, tasks, batch_size=size)
        node = Node.make({"rule": "wina"}, SITE, "0.5")
        found.append(evaluate_node(session, node, tmp_path / str(size))["tasks"])
    for task in found[0]:
        one, four = (of[task] for of in found)
        assert {name: own["zeros"] for name, own in one["sparsity"].items()} == {
            name: own["zeros"] for name, own in four["sparsity"].items()
        }
        assert one["scores"] == four["scores"]


@pytest.fixture(scope="module")
def store(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captured at the whole site, as the rules ask for it."""
    folder = tmp_path_factory.mktemp("store")
    lines = sentences(60, seed=3, shortest=12, longest=20)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    loading = {
        **{"dtype": "auto", "device": "cpu", "text": {"file": str(text)}},
        **{"tokens": TOKENS, "sequence_length": LENGTH, "batch_size": 4, "add_bos_token": None},
    }
    run_stage(
        capture,
        {
            **{"--model": manifest, "--site": "all_linear_inputs", "--siblings": ""},
            **{"--settings": json.dumps(loading), "--store": folder / "activations.zarr"},
            "--output": folder / "capture.json",
        },
    )
    return folder


def calibrated(store: Path, manifest: Path, criterion: dict[str, Any], output: Path) -> Calibration:
    loading = {"dtype": "auto", "device": "cpu", "calibration_tokens": SEEN}
    run_stage(
        calibrate,
        {
            **{"--model": manifest, "--capture": store / "capture.json", "--code": "test"},
            **{"--store": store / "activations.zarr", "--criterion": json.dumps(criterion)},
            **{"--site": SITE, "--settings": json.dumps(loading), "--output": output},
        },
    )
    return read_calibration(output)


def test_calibrated_thresholds_are_by_map(
    session: Session,
    manifest: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TEAL with its greedy allocation, which gives queries, keys and values a sparsity each."""
    monkeypatch.setattr(allocation, "STEP", 0.25)  # five times as fast
    criterion = {"rule": "teal", "allocation": "greedy"}
    found = calibrated(store, manifest, criterion, tmp_path / "c.safetensors")
    assert set(found.states) == {f"{name}.{layer}" for name in TENSORS[SITE] for layer in (0, 1)}
    captured = ActivationStore(store / "activations.zarr")
    limits = {}
    for layer in (0, 1):
        rows = np.abs(captured.read("qkv_input", layer, 0, SEEN)).ravel()
        for name in ("q_input", "k_input", "v_input"):
            assert (
                float(found.states[f"{name}.{layer}"]["table"][5000])
                == np.sort(rows)[len(rows) // 2]
            )
        for name in MAPS:
            state = found.states[f"{name}.{layer}"]
            share = float(np.interp(0.5, np.linspace(0, 1, 101), state["share"].numpy()))
            place = share * 10_000
            below = int(place + 1e-6)
            table = state["table"].double()
            limits[layer, name] = float(
                table[below] + (table[below + 1] - table[below]) * max(place - below, 0)
            )
        assert len({limits[layer, f"{name}_input"] for name in "qkv"}) > 1

    def kept(number: int, tensor: str, vector: Tensor) -> Tensor:
        return (vector.abs() >= limits[number, tensor]).nonzero().flatten()

    node = Node.make(criterion, SITE, "0.5", found)
    torch.testing.assert_close(logits(session, node), by_hand(session, kept), rtol=1e-4, atol=1e-4)


def test_output_errors_are_of_all_masks_together(
    session: Session, manifest: Path, store: Path, tmp_path: Path
) -> None:
    loading = {"dtype": "auto", "device": "cpu", "calibration_tokens": 0}
    for site in (SITE, "all_linear_inputs"):
        for rule in ("wina", "topk"):
            run_stage(
                output_error,
                {
                    **{
                        "--model": manifest,
                        "--site": site,
                        "--criterion": json.dumps({"rule": rule}),
                    },
                    **{"--store": store / "activations.zarr", "--levels": "0.5"},
                    **{"--settings": json.dumps(loading)},
                    "--output": tmp_path / f"{rule}.{site}.parquet",
                    "--masks": tmp_path / f"{rule}.{site}.masks.parquet",
                },
            )

    def errors(rule: str, site: str) -> list[float]:
        return pq.read_table(tmp_path / f"{rule}.{site}.parquet")["error"].to_pylist()

    # The same masks give the same outputs; by its own columns each map loses less.
    assert errors("topk", SITE) == pytest.approx(errors("topk", "all_linear_inputs"))
    own, common = errors("wina", SITE), errors("wina", "all_linear_inputs")
    assert all(one < other for one, other in zip(own, common, strict=True))
    masks = pq.read_table(tmp_path / f"wina.{SITE}.masks.parquet")
    assert set(masks["tensor"].to_pylist()) >= set(MAPS)


def test_the_manifest_is_the_same_as_without(manifest: Path) -> None:
    assert "q_input" not in json.dumps(read_manifest(manifest))
