"""A site confined to some layers: the others stay dense, and nothing counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsity_atlas.curves.curve import all_samples, build
from sparsity_atlas.curves.node_samples import NodeSamples
from sparsity_atlas.curves.points import estimate_all
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import search as stage
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import sparsity_at
from tiny_lm import (
    CHOICE,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    save_model,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TOPK = {"rule": "topk"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "choice": write_task(folder, "choice", choice_documents(8), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(3), **ROLLING),
    }


@pytest.fixture(scope="module")
def session(tasks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("models")
    # relu, so that the dense model has zeros.
    save_model(folder / "four", num_hidden_layers=4, hidden_act="relu")
    return open_session(write_model_manifest(folder / "four", folder / "model.json"), tasks)


@pytest.fixture(scope="module")
def dense(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    evaluate_node(session, None, folder)
    return folder


def logits(session: Session, node: Node | None) -> Tensor:
    ids = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0))
    model: Any = session.lm.model
    with torch.no_grad(), session.attach(node):
        return model(ids, use_cache=False).logits


def halved(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    """A pre-hook: the smaller half of each token's entries is zeroed."""
    (x,) = args
    smaller = x.abs().argsort(-1)[..., : x.shape[-1] // 2]
    return x.scatter(-1, smaller, 0.0)


@pytest.mark.parametrize("layers", [(0,), (1, 2), (0, 3)])
@pytest.mark.parametrize(
    ("site", "path"), [("intermediate", "mlp.down_proj"), ("o_input", "self_attn.o_proj")]
)
def test_layers_that_are_not_named_stay_dense(
    session: Session, site: str, path: str, layers: tuple[int, ...]
) -> None:
    spelled = f"{site}@layers" + {(0,): "0", (1, 2): "1-2", (0, 3): "0+3"}[layers]
    found = logits(session, Node.make(TOPK, spelled, "0.5"))
    model: Any = session.lm.model
    maps = [model.model.layers[layer].get_submodule(path) for layer in layers]
    handles = [one.register_forward_pre_hook(halved) for one in maps]
    try:
        expected = logits(session, None)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(session, None))


def test_a_node_counts_its_layers_alone(session: Session, dense: Path, tmp_path: Path) -> None:
    site = "all_inputs@layers0+2"
    node = Node.make(TOPK, site, "0.5")
    assert node.identity()["site"] == site
    assert {slot.key.layer for slot in session.slots(node)} == {0, 2}
    result = evaluate_node(session, node, tmp_path)["tasks"]["choice"]["sparsity"]
    totals = result.values()
    share = sum(one["zeros"] for one in totals) / sum(one["entries"] for one in totals)
    assert sparsity_at(tmp_path / "samples.parquet", site, ["choice"]) == share
    for tensor in ("input", "intermediate"):
        kept, first, none, third = len(result[tensor]["layers"]), *result[tensor]["layers"]
        assert (kept, none) == (3, None)
        assert min(first, third) >= 0.5
    # Of the dense run these layers, and no others: ReLU's own zeros, by hand.
    base, own = (NodeSamples(one, site) for one in (dense, tmp_path))
    rows = base.rows("pages")
    assert base.entries(rows).tolist() == own.entries(own.rows("pages")).tolist()
    assert base.outputs("pages").tolist() == own.outputs("pages").tolist()
    slots = [slot.key for slot in session.slots(None)]
    flat = rows["scoring_zeros"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    named = [
        i
        for i, key in enumerate(slots)
        if key.layer in (0, 2) and key.tensor in ("input", "intermediate")
    ]
    assert base.zeros(rows).tolist() == flat[:, named].sum(1).tolist()
    assert base.zeros(rows).sum() > 0


def test_a_search_and_its_curve(session: Session, dense: Path, tmp_path: Path) -> None:
    site = "intermediate@layers3"
    options = {"max_levels": 2, "resolution": 0.01, "tasks": {"choice": {}, "pages": {}}}
    found = stage.search(session, TOPK, site, dense, tmp_path, options)
    levels = [one["level"] for one in found["levels"]]
    nodes = {level: NodeSamples(tmp_path / level, site) for level in levels}
    settings = {"seed": 0, "replicates": 100, "bars": [0.99], "tasks": options["tasks"]}
    base = NodeSamples(dense, site)
    samples = all_samples(base, nodes, settings)
    curve = build(base, nodes, samples, estimate_all(samples, 100, 0), settings, site)
    dense_share = base.zeros(base.rows("pages")).sum() / base.entries(base.rows("pages")).sum()
    shares = {(row["level"], row["task"]): row["sparsity"] for row in curve["points"]}
    assert shares["dense", "pages"] == pytest.approx(dense_share)
    for one in found["levels"]:
        assert curve["layers"][one["level"]]["intermediate"][:3] == [None] * 3
        assert shares[one["level"], "pages"] == pytest.approx(one["sparsity"])


def test_all_layers_and_others_are_refused(session: Session, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="layer 4 has none; those that have: layers0-3"):
        evaluate_node(session, Node.make(TOPK, "input@layers4", "0.5"), tmp_path)
    with pytest.raises(AtlasError, match="is 'input' in this model"):
        evaluate_node(session, Node.make(TOPK, "input@layers0-3", "0.5"), tmp_path)
