"""The examples that edit a model and choose demonstrations: formulas, and what a run makes of them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from snakemake.utils import update_config

from checkout import ROOT
from sparsity_atlas.config.schema import parse
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.tasks.code.follow import Reach, reach
from tiny_lm import WORDS, open_session, sentences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lunar() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples/lunar.py"))


@pytest.fixture(scope="module")
def demonstrations() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples/demonstrations.py"))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_change_is_that_of_least_squares(lunar: dict[str, Any], ridge: float) -> None:
    """With a ridge: of the rows and, below them, a diagonal that wants nothing."""
    rng = np.random.default_rng(0)
    read, moves = rng.standard_normal((30, 7)), rng.standard_normal((30, 4))
    strength = np.sqrt(ridge * (read**2).sum() / 7)
    rows = np.vstack([read, strength * np.eye(7)])
    wanted = np.linalg.lstsq(rows, np.vstack([moves, np.zeros((7, 4))]), rcond=None)[0].T
    np.testing.assert_allclose(lunar["change"](read, moves, ridge), wanted, rtol=1e-8)


def test_one_down_projection_is_redirected(lunar: dict[str, Any], model_folder: Path) -> None:
    layer, untouched = (lunar["Layer"](model_folder, 1) for _ in range(2))
    before = {name: value.clone() for name, value in layer.model.state_dict().items()}
    sets = {
        "forget": [f"cat {one}" for one in sentences(24, 1)],
        "toward": [f"{one} river" for one in sentences(24, 2)],
        "retain": sentences(24, 3),
    }
    found = lunar["edit"](layer, sets, 1e-2).set_index(["prompts", "when"])
    # Only that weight is another, by what least squares say of every second prompt.
    changed = [k for k, v in layer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    (forget, last), (_, toward), (retain, _) = (
        untouched.run(sets[name][::2]) for name in ("forget", "toward", "retain")
    )
    move = 2 * (toward.mean(0) - last.mean(0))
    moves = np.concatenate([np.tile(move, (len(forget), 1)), np.zeros((len(retain), len(move)))])
    wanted = lunar["change"](np.concatenate([forget, retain]), moves, 1e-2)
    np.testing.assert_allclose(layer.down.weight.detach() - before[changed[0]], wanted, atol=1e-5)
    # What was kept out of the fit: how far it is from where it should be, in lengths of the move.
    assert found.loc["forget", "before"]["deviation"] == pytest.approx(1)
    assert found.loc["retain", "before"]["deviation"] == 0
    after = layer.run(sets["forget"][1::2])[1]
    target = untouched.run(sets["forget"][1::2])[1] + move
    far = np.linalg.norm(after - target, axis=1).mean() / np.linalg.norm(move)
    assert found.loc["forget", "after"]["deviation"] == pytest.approx(far)
    assert far < 0.95
    assert (found["low"] <= found["deviation"]).all()


def test_a_layer_without_a_dense_ffn_is_refused(lunar: dict[str, Any], model_folder: Path) -> None:
    with pytest.raises(SystemExit, match="error: --layer: 7 has no dense FFN"):
        lunar["Layer"](model_folder, 7)


def test_the_pipeline_takes_the_edited_model(lunar: dict[str, Any]) -> None:
    merged = yaml.safe_load((ROOT / "config.yaml").read_text())
    update_config(merged, lunar["configuration"](Path("a"), Path("b"), ["pairs"]))
    config = parse(merged)
    assert config.compare == [["before", "after"]]
    assert config.run[0].models == ["before", "after"]


ITEMS = [
    {"template": str(i), "context": f"{WORDS[i]} sees", "choices": ["cat", "bird"], "answer": i % 2}
    for i in range(26)
]


def test_the_worth_of_a_candidate(demonstrations: dict[str, Any]) -> None:
    """Behind a cat this model takes cats for twice as likely as birds, else for half as likely."""

    def likely(pairs: list[tuple[str, str]]) -> list[float]:
        return [
            float(np.log(2)) * (("cat" in before.split("\n")[0]) == (end == " cat"))
            for before, end in pairs
        ]

    cat = {"context": "x", "choices": ["cat", "bird"], "answer": 0}
    bird = {"context": "y", "choices": ["cat", "bird"], "answer": 1}
    found = demonstrations["rank"](likely, [cat, bird], [cat, cat, bird])
    right, wrong = np.log(2 / 3), np.log(1 / 3)
    assert found == pytest.approx([(2 * right + wrong) / 3, (2 * wrong + right) / 3])


def test_the_best_are_taken_the_best_one_last(demonstrations: dict[str, Any]) -> None:
    pool = [{"worth": worth} for worth in (-3.0, -1.0, -4.0, -2.0)]
    sampler = demonstrations["Chosen"](pool)
    assert [one["worth"] for one in sampler.sample(2)] == [-2.0, -1.0]
    assert [one["worth"] for one in sampler.sample(2, pool[1])] == [-3.0, -2.0]
    assert list(sampler.sample(0)) == []


def test_a_curve_that_is_hardly_ever_crossed_has_no_interval(
    demonstrations: dict[str, Any],
) -> None:
    drawn = np.linspace(0, 1, 101)
    found = demonstrations["difference"](np.r_[0.4, drawn])
    assert [found[name] for name in ("difference", "low", "high", "drawn")] == pytest.approx(
        [0.4, 0.025, 0.975, 1]
    )
    found = demonstrations["difference"](np.r_[-np.inf, drawn[:50], np.full(51, np.inf)])
    assert np.isnan([found["difference"], found["low"], found["high"]]).all()
    assert found["drawn"] == pytest.approx(50 / 101)


def test_chosen_demonstrations_in_a_run(
    demonstrations: dict[str, Any], manifest: Path, tmp_path: Path
) -> None:
    """lm-eval puts the best before each question; `compare` reads what the run leaves."""
    pool = [{**one, "worth": -float(i)} for i, one in enumerate(ITEMS[:6])]
    demonstrations["write_tasks"](tmp_path / "d", pool, ITEMS[6:])
    config = yaml.safe_load((tmp_path / "d/demonstrations.yaml").read_text())
    # Nothing else is asked for by the sampler's code, wherever the folder lies.
    own = tmp_path / "d/chosen_demonstrations.py"
    assert reach([own], [tmp_path]) == Reach(frozenset({own}), *[frozenset()] * 3)
    merged = yaml.safe_load((ROOT / "config.yaml").read_text())
    update_config(merged, config)
    parse(merged)
    tasks = {kind: {**entry, "num_fewshot": 2} for kind, entry in config["tasks"].items()}
    session = open_session(manifest, tasks)
    prompts = {
        kind: [
            one.args[0] for one in session.prepared(kind).leaves[f"{kind}_demonstrations"].instances
        ]
        for kind in tasks
    }
    best = "".join(f"{demonstrations['asked'](one, one['answer'])}\n\n" for one in pool[1::-1])
    assert all(one.startswith(best) for one in prompts["chosen"])
    assert not all(one.startswith(best) for one in prompts["random"])
    results = tmp_path / "results"
    evaluate_node(session, None, results / "m/dense")
    for level in ("0.9", "0.7", "0.4"):
        node = Node.make({"rule": "topp"}, "input", level)
        evaluate_node(session, node, results / "m/topp/input" / level)
    found = demonstrations["differences"](results, "m/topp/input", 200).set_index("measure")
    content = json.loads((results / "m/dense/eval.json").read_text())["tasks"]
    accuracy = {
        kind: content[kind]["scores"][f"{kind}_demonstrations"]["acc,none"] for kind in tasks
    }
    row = found.loc["dense accuracy"]
    assert (row["chosen"], row["random"]) == pytest.approx((accuracy["chosen"], accuracy["random"]))
    assert row["difference"] == pytest.approx(accuracy["chosen"] - accuracy["random"])
    assert row["low"] <= row["difference"] <= row["high"]
