"""Sparsities by phase, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sparsity_atlas.curves.curve import all_samples, build
from sparsity_atlas.curves.node_samples import NodeSamples
from sparsity_atlas.curves.phases import phase_profile
from sparsity_atlas.curves.points import estimate_all
from sparsity_atlas.evaluation.samples import SCHEMA, SampleTable
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.statistics.bootstrap import TaskSamples, estimate, resampled_shares
from sparsity_atlas.tables.layer_table import layer_rows
from sparsity_atlas.terms import ACCOUNTS

# Two layers; in the second there is a shared expert beside the routed ones, of which a token meets 3.
SLOTS = [
    ["input", 0, 4, "ffn"],
    ["intermediate", 0, 10, "ffn"],
    ["intermediate", 1, 5, "shared"],
    ["intermediate", 1, 30, "experts"],
]
SETTINGS = {"seed": 1, "replicates": 100, "bars": [0.99]}
ITEMS = 30


def entry(
    item: int, right: float, tokens: dict[str, int], zeros: dict[str, list[int]]
) -> dict[str, Any]:
    """A document's row, of `zeros` a token in each slot."""
    return {
        **{"leaf": "leaf", "doc_id": item, "doc_hash": f"h{item}", "cluster": None},
        **{"metrics": [("acc,none", right)], "nats": 1.0, "predicted": 1},
        **{"cut_tokens": 0, "windows": 0, "unfinished": 0},
        **{f"{one}_tokens": tokens.get(one, 0) for one in ACCOUNTS},
        **{
            f"{one}_zeros": [tokens[one] * n for n in zeros[one]] if one in zeros else []
            for one in ACCOUNTS
        },
        "unique_tokens": 1,
    }


def write(
    folder: Path, tasks: dict[str, list[dict[str, Any]]], failed: tuple[str, ...] = ()
) -> None:
    """A node of these rows; tasks that failed have none."""
    shares = {
        "input": {"outputs": [20], "zero_products": 1, "products": 2, "layers": [0.5]},
        "intermediate": {
            **{"outputs": [4, 4, 4], "zero_products": 1, "products": 2, "layers": [0.5, 0.5]}
        },
    }
    result = {
        **{"status": "ok", "items": ITEMS, "output_types": ["generate_until"], "leaves": ["leaf"]},
        **{"chance": None, "scores": {"leaf": {"acc,none": 1.0}}, "sparsity": shares},
        **{"higher_is_better": {"leaf": {"acc": True}}},
        "cut": {"items": 0, "tokens": 0, "windowed": 0, "windows": 0, "unfinished": 0},
    }
    results = {
        name: {"status": "failed", "reason": "NaN"} if name in failed else result for name in tasks
    }
    table = SampleTable(SLOTS)
    table.tasks = {name: {"fingerprint": "f", "result": one} for name, one in results.items()}
    table.rows = {
        name: pa.Table.from_pylist(
            [{"task": name, **row} for row in rows if name not in failed], SCHEMA
        )
        for name, rows in tasks.items()
    }
    table.write(folder / "samples.parquet")
    write_manifest(folder / "eval.json", {"tasks": results})


def generated(zeros: dict[str, list[int]], made: int = 2) -> list[dict[str, Any]]:
    tokens = {"prompt": 3, "generation": made}
    return [entry(item, 1.0, tokens, zeros) for item in range(ITEMS)]


def scored(zeros: list[int]) -> list[dict[str, Any]]:
    return [entry(item, 1.0, {"scoring": 4}, {"scoring": zeros}) for item in range(ITEMS)]


NONE = [0, 0, 0, 0]
# Of 4, 10, 5 and 30 entries a token.
ASKED = {"prompt": [1, 2, 5, 6], "generation": [2, 5, 0, 15]}


@pytest.fixture
def nodes(tmp_path: Path) -> dict[str, Path]:
    write(
        tmp_path / "dense",
        {
            "answers": generated({"prompt": NONE, "generation": NONE}),
            "choices": scored([0, 1, 0, 0]),
        },
    )
    write(tmp_path / "0.9", {"answers": generated(ASKED), "choices": scored([4, 9, 4, 30])})
    # It stops at once, so that nothing is fed back.
    silent = generated({"prompt": ASKED["prompt"], "generation": NONE}, made=0)
    write(tmp_path / "0.5", {"answers": silent, "choices": scored([4, 9, 4, 30])})
    write(
        tmp_path / "0.1",
        {"answers": generated(ASKED), "choices": scored(NONE)},
        failed=("answers",),
    )
    return {name: tmp_path / name for name in ("dense", "0.9", "0.5", "0.1")}


def content(nodes: dict[str, Path], site: str, tasks: tuple[str, ...]) -> dict[str, Any]:
    dense, *levels = (NodeSamples(folder, site) for folder in nodes.values())
    by_level = dict(zip(list(nodes)[1:], levels, strict=True))
    settings = {**SETTINGS, "tasks": {task: {} for task in tasks}}
    samples = all_samples(dense, by_level, settings)
    return build(dense, by_level, samples, estimate_all(samples, 100, 1), settings, site)


def test_each_phase_has_its_own_sparsity(nodes: dict[str, Path]) -> None:
    found = content(nodes, "intermediate", ("answers", "choices"))
    rows = {(one["phase"], one["level"]): one for one in found["phase_points"]}
    # The other task has one phase, which its curve tells of.
    assert {one["task"] for one in found["phase_points"]} == {"answers"}
    assert {one["phase"] for one in found["points"]} == {"all"}
    assert list(rows) == [(phase, level) for phase in ("prompt", "generation") for level in nodes]
    shares = {key: row["sparsity"] for key, row in rows.items()}
    assert shares == {
        ("prompt", "dense"): 0,
        ("prompt", "0.9"): pytest.approx((2 + 5 + 6) / 45),
        ("prompt", "0.5"): pytest.approx((2 + 5 + 6) / 45),
        ("prompt", "0.1"): None,
        ("generation", "dense"): 0,
        ("generation", "0.9"): pytest.approx(20 / 45),
        ("generation", "0.5"): None,
        ("generation", "0.1"): None,
    }
    assert rows["generation", "0.1"]["status"] == "failed"
    assert rows["generation", "0.5"]["status"] == "ok"
    # Every document is the same.
    assert rows["prompt", "0.9"]["sparsity_low"] == pytest.approx(13 / 45)
    assert rows["generation", "0.9"]["parameter_sparsity"] == pytest.approx(20 / 45)
    assert rows["generation", "0.9"]["value"] is rows["generation", "0.9"]["fitted"] is None
    # Both together are what the curve has: 3 tokens of one and 2 of the other.
    (whole,) = (
        one["sparsity"]
        for one in found["points"]
        if (one["task"], one["level"]) == ("answers", "0.9")
    )
    assert whole == pytest.approx((3 * 13 + 2 * 20) / (5 * 45))
    assert found["points"][0].keys() == found["phase_points"][0].keys()


def test_several_tensors_weigh_as_their_readers(nodes: dict[str, Path]) -> None:
    found = content(nodes, "all_inputs", ("answers",))
    rows = {(one["phase"], one["level"]): one for one in found["phase_points"]}
    assert rows["generation", "0.9"]["sparsity"] == pytest.approx(22 / 49)
    assert rows["generation", "0.9"]["parameter_sparsity"] == pytest.approx(
        (2 * 20 + 20 * 4) / (4 * 20 + 45 * 4)
    )


def test_layers_by_phase_are_means_over_the_tasks_that_have_it(nodes: dict[str, Path]) -> None:
    node = NodeSamples(nodes["0.9"], "intermediate")
    assert phase_profile(node, ["choices"]) == {}
    found = phase_profile(node, ["answers", "choices"])
    assert list(found) == ["scoring", "prompt", "generation"]
    # The second layer's two parts are one layer.
    assert found["scoring"]["intermediate"] == pytest.approx([0.9, 34 / 35])
    assert found["prompt"]["intermediate"] == pytest.approx([0.2, 11 / 35])
    assert found["generation"]["intermediate"] == pytest.approx([0.5, 15 / 35])
    twice = phase_profile(node, ["answers", "answers"])
    assert twice["prompt"] == found["prompt"]
    # In some parts only, where the first layer stays dense.
    (shared,) = phase_profile(
        NodeSamples(nodes["0.9"], "intermediate@shared"), ["answers", "choices"]
    )["prompt"].values()
    assert shared == [None, 1.0]


def test_rows_of_the_tables(nodes: dict[str, Path]) -> None:
    found = content(nodes, "intermediate@shared", ("answers", "choices"))
    key = {"model": "m", "criterion": "topp", "site": "intermediate@shared"}
    rows = list(layer_rows(key, found, []))
    by_phase = [
        (one["level"], one["layer"], one["sparsity"]) for one in rows if one["phase"] == "prompt"
    ]
    assert by_phase == [("0.9", 1, 1.0), ("0.5", 1, 1.0)]
    assert {tuple(one) for one in rows} == {tuple(rows[0])}
    assert sum(one["phase"] == "all" for one in rows) == 3 * 3


def test_documents_are_drawn_as_for_the_curve() -> None:
    rng = np.random.default_rng(0)
    zeros = rng.integers(0, 11, (2, ITEMS))
    score, entries = np.ones((2, ITEMS)), np.full((2, ITEMS), 10)
    for cluster in (None, np.arange(ITEMS) % 12):
        samples = TaskSamples(
            task="answers",
            kind="accuracy",
            value=score,
            weight=score[0],
            dense=score[0],
            zeros=zeros,
            entries=entries,
            cluster=cluster,
        )
        shares = resampled_shares("answers", zeros, entries, cluster, 50, 7)
        assert np.array_equal(shares, estimate(samples, 50, 7).sparsity)
