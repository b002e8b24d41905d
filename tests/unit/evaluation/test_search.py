"""A search leaves ordinary nodes, and spends nothing on what it finds done."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from interruptions import Interrupted, products, watch
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import damage
from sparsity_atlas.evaluation import search as stage
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.spelling import canonical_level
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    letter_documents,
    open_session,
    rolling_documents,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOPP = {"rule": "topp"}
ZOO = Path(__file__).resolve().parents[3] / "workflow/resources/zoo"


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A loss and an accuracy."""
    folder = tmp_path / "tasks"
    return {
        "letters": write_task(folder, "letters", letter_documents(4), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(3), **ROLLING),
    }


def options(tasks: dict, **changes: Any) -> dict[str, Any]:
    """What `grid.search_slice` gives, spelled out."""
    return {"max_levels": 6, "resolution": 0.01, "tasks": {name: {} for name in tasks}, **changes}


def search(
    manifest: Path, tasks: dict, folder: Path, stop_after: int | None = None, **changes: Any
) -> tuple[dict[str, Any], list[str]]:
    session = open_session(manifest, tasks)
    evaluate_node(session, None, folder / "dense")
    calls = watch(session, stop_after)
    result = stage.search(
        session, TOPP, "intermediate", folder / "dense", folder / "nodes", options(tasks, **changes)
    )
    return result, calls


def test_levels_are_ordinary_nodes(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    result, calls = search(manifest, tasks, tmp_path)
    levels = [one["level"] for one in result["levels"]]
    assert levels[0] == "0.9"
    assert len(levels) == len(set(levels)) <= 6
    assert result["headline"] == "pages"
    assert calls
    session = open_session(manifest, tasks)
    again = watch(session)
    for one in result["levels"]:
        node = Node.make(TOPP, "intermediate", one["level"])
        manifest_of_node = evaluate_node(session, node, tmp_path / "nodes" / one["level"])
        shares = {
            name: task["sparsity"]["intermediate"]["total"]
            for name, task in manifest_of_node["tasks"].items()
        }
        # The headline's own sparsity: that of other tasks would misplace the bracket.
        assert shares["letters"] != shares["pages"]
        assert one["sparsity"] == pytest.approx(shares["pages"])
    assert again == []
    repeated, calls = search(manifest, tasks, tmp_path)
    assert calls == []
    assert repeated == result


def test_nodes_are_those_of_a_list(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    search(manifest, tasks, tmp_path)
    session = open_session(manifest, tasks)
    evaluate_node(session, Node.make(TOPP, "intermediate", "0.75"), tmp_path / "alone")
    assert products(tmp_path / "alone") == products(tmp_path / "nodes" / "0.75")


def test_interrupted_and_resumed(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    result, whole = search(manifest, tasks, tmp_path / "whole")
    stop = len(whole) // 2
    with pytest.raises(Interrupted):
        search(manifest, tasks, tmp_path / "cut", stop)
    resumed, calls = search(manifest, tasks, tmp_path / "cut")
    assert calls == whole[stop:]
    assert resumed == result
    for one in result["levels"]:
        folders = (tmp_path / name / "nodes" / one["level"] for name in ("whole", "cut"))
        first, second = (products(folder) for folder in folders)
        assert first == second


def test_each_p_is_bracketed_where_bisection_finds_it(tmp_path: Path) -> None:
    # Of a trained model, which gets worse the more is dropped.
    manifest = write_model_manifest(ZOO / "small", tmp_path / "results" / "model.json")
    pages = {"pages": {"task": "atlas_prose", "include": str(ZOO.parent / "tasks"), "limit": 2}}
    result, _ = search(manifest, pages, tmp_path, ppl=[1, 5, 10])
    assert [one["p"] for one in result["further"]] == [5, 10]
    assert all(one["stopped"].startswith("bracketed") for one in result["further"]), result
    session = open_session(manifest, pages)
    metrics = {"pages": ("loss", None)}
    dense = damage.read_scores(tmp_path / "dense", metrics)

    def measured(level: str) -> tuple[float, float]:
        """Induced sparsity and perplexity over the dense model's."""
        node = Node.make(TOPP, "intermediate", level)
        found = evaluate_node(session, node, tmp_path / "nodes" / level)
        scores = damage.read_scores(tmp_path / "nodes" / level, metrics)
        ratio = math.exp(scores["pages"] - dense["pages"])
        return stage.induced(found["tasks"], "intermediate", ["pages"]), ratio

    known = [(one["sparsity"], one["damage"]) for one in result["levels"]]
    for p in (1, 5, 10):
        allowed = math.log1p(p / 100) / math.log(1.01)
        before = max(sparsity for sparsity, damage in known if damage <= allowed)
        after = min(sparsity for sparsity, damage in known if damage > allowed)
        assert after - before <= 0.03
        if p == 5:
            mild, harsh = 1.0, 0.0
            for _ in range(8):
                middle = (mild + harsh) / 2
                good = measured(canonical_level(middle))[1] <= 1.05
                mild, harsh = (middle, harsh) if good else (mild, middle)
            place = measured(canonical_level(harsh))[0]
            assert before - 0.005 <= place <= after + 0.005


def test_damage_is_the_added_loss_of_the_first_loss_task(
    manifest: Path, tasks: dict, tmp_path: Path
) -> None:
    result, _ = search(manifest, tasks, tmp_path)
    losses = []
    for folder in ("dense", "nodes/0.5"):
        rows = read_table(tmp_path / folder / "samples.parquet")[1].to_pylist()
        pages = [row for row in rows if row["task"] == "pages"]
        losses.append(sum(row["nats"] for row in pages) / sum(row["predicted"] for row in pages))
    (damage,) = (one["damage"] for one in result["levels"] if one["level"] == "0.5")
    # ln 1.01 = 0.00995
    assert damage == pytest.approx((losses[1] - losses[0]) / 0.00995033, rel=1e-5)


def test_damage_of_accuracies_is_the_lost_share_of_their_average() -> None:
    metrics = {"a": ("accuracy", "acc,none"), "b": ("accuracy", "acc,none")}
    # 1.5 in all: a loss of 0.0075 in either is half a percent.
    dense = {"a": 0.9, "b": 0.6}
    assert damage.damage(metrics, dense, {"a": 0.9, "b": 0.5925}) == pytest.approx(0.5)
    assert damage.damage(metrics, dense, {"a": 0.885, "b": 0.6}) == pytest.approx(1.0)
    assert damage.damage(metrics, dense, {"a": 0.9, "b": 0.615}) == pytest.approx(-1.0)
    assert damage.damage(metrics, dense, None) == float("inf")


def test_the_slightest_damage_is_of_the_loss_or_of_the_average_accuracy() -> None:
    metrics = {"p": ("loss", None), "a": ("accuracy", "acc,none"), "b": ("accuracy", "acc,none")}
    dense = {"p": 3.0, "a": 0.9, "b": 0.6}
    # The loss rose by six times what the bar allows; 1.5 % of 1.5 are lost.
    scores = {"p": 3.0 + 6 * damage.ALLOWED_LOSS, "a": 0.9, "b": 0.5775}
    assert damage.damage(metrics, dense, scores) == pytest.approx(6)
    assert damage.slightest(metrics, dense, scores) == pytest.approx(1.5)
    assert damage.slightest({"p": metrics["p"]}, dense, scores) == pytest.approx(6)
    # An accuracy of nothing cannot fall.
    assert damage.slightest(metrics, {**dense, "a": 0.0, "b": 0.0}, scores) == pytest.approx(6)
    assert damage.slightest(metrics, dense, None) == float("inf")


def test_each_level_is_said_as_it_ends(
    manifest: Path, tasks: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="sparsity_atlas"):
        result, _ = search(manifest, tasks, tmp_path, max_levels=2)
    said = [record.message for record in caplog.records if record.message.startswith("level ")]
    assert [line.split(":")[0] for line in said] == [
        f"level {one['level']}" for one in result["levels"]
    ]
    sparsity = 100 * result["levels"][0]["sparsity"]
    assert re.fullmatch(
        rf"level 0.9: {sparsity:.1f} % sparse, pages \d\.\d{{4}} nats \(dense \d\.\d{{4}}\), "
        r"-?\d+\.\d\d of the damage that the bar allows; took \d+ s, at most 1 more, \d+ s",
        said[0],
    )
    assert said[1].endswith(" s, the last")


def test_failed_levels_are_levels(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(manifest, tasks)
    evaluate_node(session, None, tmp_path / "dense")
    original, sparse = session.lm._model_call, []

    def harsh_fails(inputs: torch.Tensor, **changes: Any) -> torch.Tensor:
        return original(inputs, **changes) * (float("nan") if sparse[-1] < 0.6 else 1)

    attach = session.attach
    monkeypatch.setattr(session.lm, "_model_call", harsh_fails)
    monkeypatch.setattr(
        session, "attach", lambda node: sparse.append(float(node.level)) or attach(node)
    )
    folder = tmp_path / "nodes"
    result = stage.search(session, TOPP, "intermediate", tmp_path / "dense", folder, options(tasks))
    by_level = {one["level"]: one for one in result["levels"]}
    assert by_level["0.5"] == {"level": "0.5", "sparsity": None, "damage": None}
    assert by_level["0.75"]["damage"] is not None
    json.dumps(result, allow_nan=False)


def test_a_dense_model_that_failed_is_not_searched(
    manifest: Path, tasks: dict, tmp_path: Path
) -> None:
    session = open_session(manifest, tasks)
    with torch.no_grad():
        session.lm.model.lm_head.weight[0, 0] = float("nan")
    evaluate_node(session, None, tmp_path / "dense")
    calls = watch(session)
    result = stage.search(
        session, TOPP, "intermediate", tmp_path / "dense", tmp_path / "nodes", options(tasks)
    )
    assert result["levels"] == calls == []
    assert result["stopped"] == "the dense model failed on every task"


def test_a_dense_model_that_scores_nothing_is_not_searched(manifest: Path, tmp_path: Path) -> None:
    entry = write_task(tmp_path / "tasks", "words", rolling_documents(2), **GENERATION)
    result, calls = search(manifest, {"words": entry}, tmp_path)
    assert result["levels"] == calls == []
    assert result["stopped"] == "the dense model scores 0 on every task"


def test_a_metric_that_is_not_there(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    session = open_session(manifest, tasks)
    evaluate_node(session, None, tmp_path / "dense")
    wanted = {**options(tasks), "tasks": {"letters": {"metric": "f1"}, "pages": {}}}
    with pytest.raises(AtlasError, match=r"tasks\.letters: metric: no 'f1' among its metrics: acc"):
        stage.search(session, TOPP, "intermediate", tmp_path / "dense", tmp_path / "nodes", wanted)


def test_command_line(manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: Any) -> None:
    from tiny_lm import settings

    session = open_session(manifest, tasks, code="abc")
    evaluate_node(session, None, tmp_path / "dense")
    output = tmp_path / "curve" / "search.json"
    arguments = {
        "--model": manifest,
        "--dense": tmp_path / "dense" / "eval.json",
        "--settings": json.dumps(settings(tasks)),
        "--search": json.dumps({"max_levels": 2}),
        "--code": "abc",
        "--criterion": json.dumps(TOPP),
        "--site": "intermediate",
        "--output": output,
    }
    monkeypatch.setattr(
        "sys.argv", ["x", *(str(one) for pair in arguments.items() for one in pair)]
    )
    stage.main()
    written = read_manifest(output)
    assert written["stopped"] == "2 levels evaluated"
    assert len(written["levels"]) == 2
    assert written["levels"][0]["level"] == "0.9"
    calls = watch(session)
    evaluate_node(session, Node.make(TOPP, "intermediate", "0.9"), tmp_path / "curve" / "0.9")
    assert calls == []
