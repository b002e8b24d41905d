"""A site confined to some parts of the layers: the others stay dense, and nothing counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interruptions import products, watch
from mixtures import wide_mixture
from sparsity_atlas.curves.curve import all_samples, build, layer_profile
from sparsity_atlas.curves.node_samples import NodeSamples
from sparsity_atlas.curves.points import estimate_all
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import search as stage
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import sparsity_at
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.studies import sensitivity
from tiny_lm import (
    CHOICE,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    save_model,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TOPP = {"rule": "topp"}
# One dense layer before two with a shared expert and routed ones; relu, so that the dense model has zeros.
DEEPSEEK = {"vocab_size": 300, "max_position_embeddings": 48, "hidden_act": "relu"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deepseek"
    wide_mixture("deepseek_v3", 32, **DEEPSEEK).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return write_model_manifest(folder, folder.parent / "model.json")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "choice": write_task(folder, "choice", choice_documents(10), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(3), **ROLLING),
    }


@pytest.fixture(scope="module")
def session(manifest: Path, tasks: dict[str, Any]) -> Session:
    return open_session(manifest, tasks)


@pytest.fixture(scope="module")
def dense(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    evaluate_node(session, None, folder)
    return folder


def test_two_names_for_one_site_are_run_once(tmp_path: Path, tasks: dict[str, Any]) -> None:
    """In a model of experts alone, asked for by path: the second takes over what the first has."""
    save_model(tmp_path / "olmoe", kind="olmoe", num_experts=4, num_experts_per_tok=2)
    session = open_session(write_model_manifest(tmp_path / "olmoe", tmp_path / "m.json"), tasks)
    calls = watch(session)
    found, counts = {}, []
    for site in ("intermediate@experts", "intermediate"):
        folder = tmp_path / "results/olmoe/topp" / site / "0.8"
        found[site] = evaluate_node(session, Node.make(TOPP, site, "0.8"), folder)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    first, second = found.values()
    assert (first.pop("site"), second.pop("site")) == tuple(found)
    assert first == second
    tables = [products(tmp_path / "results/olmoe/topp" / site / "0.8") for site in found]
    assert tables[0].keys() == tables[1].keys() >= {"experts.parquet", "samples.parquet"}
    assert all(tables[0][name] == tables[1][name] for name in tables[0] if name != "eval.json")


def logits(session: Session, node: Node | None) -> Tensor:
    ids = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0))
    model: Any = session.lm.model
    with torch.no_grad(), session.attach(node):
        return model(ids, use_cache=False).logits


def everything_dropped(session: Session, parts: str) -> Tensor:
    return logits(session, Node.make({"rule": "topk"}, f"intermediate@{parts}", "0"))


def removed(session: Session, modules: list[nn.Module]) -> Tensor:
    """The model without what these modules make."""
    handles = [one.register_forward_hook(lambda module, args, out: out * 0) for one in modules]
    try:
        return logits(session, None)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("parts", ["ffn", "shared", "experts", "ffn+experts", "shared+experts"])
def test_what_is_not_named_stays_dense(session: Session, parts: str) -> None:
    layers: Any = session.lm.model.model.layers
    modules = {
        "ffn": [layers[0].mlp],
        "shared": [layer.mlp.shared_experts for layer in layers[1:]],
        "experts": [layer.mlp.experts for layer in layers[1:]],
    }
    gone = [module for part in parts.split("+") for module in modules[part]]
    found = everything_dropped(session, parts)
    torch.testing.assert_close(found, removed(session, gone), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, logits(session, None), atol=1e-3)


@pytest.mark.parametrize("site", ["input", "gate", "intermediate", "all_inputs"])
def test_a_node_counts_its_parts_alone(
    session: Session, dense: Path, tmp_path: Path, site: str
) -> None:
    parts = {}
    for name in ("ffn", "shared", "experts", "shared+experts"):
        node = Node.make(TOPP, f"{site}@{name}", "0.9")
        assert node.identity()["site"] == f"{site}@{name}"
        slots = session.slots(node)
        assert {slot.key.part for slot in slots} == set(name.split("+"))
        result = evaluate_node(session, node, tmp_path / name)
        parts[name] = result["tasks"]["choice"]["sparsity"]
        table = sparsity_at(tmp_path / name / "samples.parquet", f"{site}@{name}", ["choice"])
        totals = parts[name].values()
        assert table == sum(one["zeros"] for one in totals) / sum(one["entries"] for one in totals)
        # Of the dense run those slots, and no others.
        base, own = (NodeSamples(one, f"{site}@{name}") for one in (dense, tmp_path / name))
        rows = base.rows("choice")
        assert base.entries(rows).tolist() == own.entries(own.rows("choice")).tolist()
        assert base.outputs("choice").tolist() == own.outputs("choice").tolist()
    every = evaluate_node(session, Node.make(TOPP, site, "0.9"), tmp_path / "all")
    for tensor, whole in every["tasks"]["choice"]["sparsity"].items():
        entries = [parts[name][tensor]["entries"] for name in ("ffn", "shared", "experts")]
        assert sum(entries) == whole["entries"]
        assert entries[1] + entries[2] == parts["shared+experts"][tensor]["entries"]
        assert parts["ffn"][tensor]["layers"][1:] == []
        assert parts["experts"][tensor]["layers"][0] is None
        assert all(parts["experts"][tensor]["layers"][1:])


def test_dense_zeros_are_those_of_the_parts(session: Session, dense: Path) -> None:
    """ReLU's own zeros, by hand."""
    header = {
        (slot.key.part, slot.key.layer): i
        for i, slot in enumerate(session.slots(None))
        if slot.key.tensor == "intermediate"
    }
    zeros = {}
    for name in ("ffn", "shared", "experts"):
        samples = NodeSamples(dense, f"intermediate@{name}")
        rows = samples.rows("pages")
        flat = rows["scoring_zeros"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
        own = [i for (part, _), i in header.items() if part == name]
        assert samples.zeros(rows).tolist() == flat[:, own].sum(1).tolist()
        zeros[name] = sparsity_at(dense / "samples.parquet", f"intermediate@{name}", ["pages"])
        expected = samples.zeros(rows).sum() / samples.entries(rows).sum()
        assert zeros[name] == pytest.approx(expected)
    assert len(set(zeros.values())) == 3


def test_a_search_and_its_curve(session: Session, dense: Path, tmp_path: Path) -> None:
    site = "intermediate@experts"
    options = {"max_levels": 3, "resolution": 0.01, "tasks": {"choice": {}, "pages": {}}}
    found = stage.search(session, TOPP, site, dense, tmp_path, options)
    levels = [one["level"] for one in found["levels"]]
    assert levels
    nodes = {level: NodeSamples(tmp_path / level, site) for level in levels}
    settings = {"seed": 0, "replicates": 100, "bars": [0.99], "tasks": options["tasks"]}
    base = NodeSamples(dense, site)
    samples = all_samples(base, nodes, settings)
    curve = build(base, nodes, samples, estimate_all(samples, 100, 0), settings, site)
    for one in found["levels"]:
        shares = curve["layers"][one["level"]]["intermediate"]
        assert shares[0] is None
        assert len(shares) == 3
        (point,) = (
            row for row in curve["points"] if (row["level"], row["task"]) == (one["level"], "pages")
        )
        assert point["sparsity"] == pytest.approx(one["sparsity"])
        # One tensor whose entries all meet as many weights.
        assert point["parameter_sparsity"] == pytest.approx(one["sparsity"])
    assert layer_profile(nodes[levels[0]], ["choice", "pages"])["intermediate"][1:] == [
        pytest.approx(
            np.mean(
                [
                    nodes[levels[0]].manifest["tasks"][task]["sparsity"]["intermediate"]["layers"][
                        i
                    ]
                    for task in ("choice", "pages")
                ]
            )
        )
        for i in (1, 2)
    ]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("o_input", "no site 'o_input' in this model; it has input"),
        (
            "input@router",
            "'input@router': no part 'router' in this model; it has ffn, shared, experts",
        ),
    ],
)
def test_what_is_not_there_is_refused(
    session: Session, tmp_path: Path, site: str, message: str
) -> None:
    with pytest.raises(AtlasError, match=message):
        evaluate_node(session, Node.make(TOPP, site, "0.9"), tmp_path)


def test_a_dense_model_has_no_experts(model_folder: Path, tasks: dict, tmp_path: Path) -> None:
    path = write_model_manifest(model_folder, tmp_path / "model.json")
    assert "parts" not in read_manifest(path)
    with pytest.raises(AtlasError, match="no part 'experts' in this model; it has ffn"):
        evaluate_node(open_session(path, tasks), Node.make(TOPP, "up@experts", "0.9"), tmp_path)
    plainly = evaluate_node(open_session(path, tasks), Node.make(TOPP, "up", "0.9"), tmp_path / "a")
    named = evaluate_node(
        open_session(path, tasks), Node.make(TOPP, "up@ffn", "0.9"), tmp_path / "b"
    )
    assert plainly["tasks"] == named["tasks"]
    assert plainly["fingerprints"] == named["fingerprints"]  # two names for one node


def test_single_layers_of_some_parts(session: Session, tmp_path: Path) -> None:
    from sparsity_atlas.criteria import create
    from sparsity_atlas.criteria.binding import bind_all
    from sparsity_atlas.files.journal import Journal
    from sparsity_atlas.sites.part import chosen

    parts, site = chosen(session.parts, "intermediate@experts")
    ids = torch.randint(3, 290, (10, 12), generator=torch.Generator().manual_seed(0))
    journal = Journal(tmp_path / "journal", {})
    bound = bind_all(create(TOPP), parts, site, None)
    made = sensitivity.passes(parts, site, bound, ["0.5"], ids, 4, journal)
    journal.close()
    rows = list(sensitivity.rows(parts, site, ["0.5"], made, 12, 100, 0))
    assert [row["layer"] for row in rows] == [1, 2]
    assert all(0 < row["sparsity"] < 1 for row in rows)
