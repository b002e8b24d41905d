"""From sample tables of known numbers to curve.json and the summary of a model."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sparsity_atlas.curves import curve
from sparsity_atlas.curves.curve import identity, parameter_sparsity
from sparsity_atlas.curves.equal_sparsity import read_crossings, read_equal
from sparsity_atlas.curves.node_samples import NodeSamples
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.samples import SCHEMA, SampleTable, read_table
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.tables import summarize

ITEMS = 2000
# Two layers: input of width 4, intermediate of width 10.
SLOTS = [["input", 0, 4], ["intermediate", 0, 10], ["input", 1, 4], ["intermediate", 1, 10]]
NODE_SLOTS = [slot for slot in SLOTS if slot[0] == "intermediate"]
Scores = dict[str, Any]


def row(task: str, leaf: str, item: int, slots: list, zeros: int, **values: Any) -> dict[str, Any]:
    """A sample of 3 tokens of a prompt and 2 generated ones; `zeros` of each 10 entries are zero."""
    return {
        **{"task": task, "leaf": leaf, "doc_id": item, "doc_hash": f"h{item}", "cluster": None},
        **{"metrics": [], "nats": 0.0, "predicted": 1, "cut_tokens": 0, "windows": 0},
        "unfinished": 0,
        **{"scoring_tokens": 0, "prompt_tokens": 3, "generation_tokens": 2, "denoising_tokens": 0},
        **{"unique_tokens": 3, "scoring_zeros": [], "denoising_zeros": [], "unique_zeros": []},
        "prompt_zeros": [3 * zeros * (slot[0] == "intermediate") for slot in slots],
        "generation_zeros": [2 * zeros * (slot[0] == "intermediate") for slot in slots],
        **values,
    }


def write_node(
    folder: Path, *, dense: bool, zeros: int, right: float | None, nats: float | None
) -> None:
    """A node whose `group` has `right` of its items right and whose `pages` cost `nats` a token.

    None: the task failed. The group has two leaves, of a quarter and three quarters of the items.
    """
    slots = SLOTS if dense else NODE_SLOTS
    table = SampleTable(slots)
    results: dict[str, Any] = {}
    share = {
        **{"total": zeros / 10, "prompt": zeros / 10, "generation": zeros / 10},
        "layers": [zeros / 10] * 2,
        **{"zero_products": 7 * zeros, "products": 70, "outputs": [7, 7]},
    }
    common = {
        "status": "ok",
        "items": ITEMS,
        "cut": {"items": 2, "tokens": 9, "windowed": 0, "windows": 0, "unfinished": 1 + zeros},
        "sparsity": {name: share for name in dict.fromkeys(slot[0] for slot in slots)},
    }
    failed = {"status": "failed", "reason": "NaN or infinity in 'intermediate' of layer 1"}
    rows: dict[str, list[dict[str, Any]]] = {"group": [], "pages": []}
    results["group"] = results["pages"] = failed
    if right is not None:
        rows["group"] = [
            row("group", "a" if item < ITEMS // 4 else "b", item, slots, zeros)
            | {"metrics": [("acc,none", float((item * 7) % ITEMS < round(right * ITEMS)))]}
            for item in range(ITEMS)
        ]
        results["group"] = {
            **common,
            "output_types": ["multiple_choice"],
            "leaves": ["a", "b"],
            "chance": 0.25,
            "scores": {
                "a": {"acc,none": 0.0},
                "b": {"acc,none": 0.0},
                "group": {"acc,none": right},
            },
            "higher_is_better": {"a": {"acc": True}, "b": {"acc": True}, "group": {"acc": True}},
        }
    if nats is not None:
        rows["pages"] = [
            # Documents of unlike lengths: the mean is over tokens.
            row("pages", "pages", item, slots, zeros, nats=nats * (1 + item), predicted=1 + item)
            for item in range(20)
        ]
        # An empty document, as a text may have.
        empty = {"prompt_tokens": 0, "unique_tokens": 0, "generation_tokens": 0}
        empty |= {"nats": 0.0, "predicted": 0}
        rows["pages"].append(row("pages", "pages", 20, slots, 0, **empty))
        results["pages"] = {
            **common,
            "output_types": ["loglikelihood_rolling"],
            "leaves": ["pages"],
            "chance": None,
            "scores": {"pages": {"word_perplexity,none": math.exp(nats)}},
            "higher_is_better": {"pages": {"word_perplexity": False}},
        }
    table.rows = {name: pa.Table.from_pylist(some, SCHEMA) for name, some in rows.items()}
    table.tasks = {name: {"fingerprint": "f", "result": one} for name, one in results.items()}
    table.write(folder / "samples.parquet")
    write_manifest(folder / "eval.json", {"status": "ok", "tasks": results})


# level: zeros of 10, share right, nats a token. Dense: 60 % right, 3 nats.
LEVELS: dict[str, tuple[int, float | None, float | None]] = {
    "0.9": (2, 0.6, 3.0),
    "0.8": (4, 0.6, 3 + math.log(1.01) / 2),
    "0.7": (6, 0.588, 3 + 3 * math.log(1.01) / 2),
    "0.6": (8, None, None),
}
SETTINGS = {"seed": 1, "replicates": 100, "bars": [0.99, 0.95], "tasks": {"group": {}, "pages": {}}}


def run(
    results: Path, levels: dict = LEVELS, dense: tuple = (0, 0.6, 3.0), **changes: Any
) -> dict[str, Any]:
    """Stage `curve` on nodes of these numbers; the content of curve.json."""
    model = results / "small"
    write_node(model / "dense", dense=True, zeros=dense[0], right=dense[1], nats=dense[2])
    folder = model / "topp" / "intermediate"
    for level, (zeros, right, nats) in levels.items():
        write_node(folder / level, dense=False, zeros=zeros, right=right, nats=nats)
    # Two of them listed, all of them searched for.
    search = folder / "search.json"
    write_manifest(search, {"levels": [{"level": level} for level in levels]})
    arguments = {
        **{"--dense": model / "dense" / "eval.json", "--levels": ",".join(list(levels)[:2])},
        **{"--search": search, "--site": "intermediate", "--output": folder / "curve.json"},
        **{"--settings": json.dumps(SETTINGS | changes), "--equal": folder / "equal.parquet"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x", *(str(one) for pair in arguments.items() for one in pair)])
        curve.main()
    return read_manifest(folder / "curve.json")


def points(content: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    return {one["level"]: one for one in content["points"] if one["task"] == task}


def critical(content: dict[str, Any], task: str, bar: float) -> dict[str, Any]:
    (found,) = (one for one in content["critical"] if (one["task"], one["bar"]) == (task, bar))
    return found


def test_known_numbers(tmp_path: Path) -> None:
    content = run(tmp_path)
    assert content["levels"] == list(LEVELS)
    group = points(content, "group")
    assert group["dense"]["value"] == 0.6
    assert group["dense"]["sparsity"] == 0
    assert [group[level]["sparsity"] for level in ("0.9", "0.8", "0.7")] == [0.2, 0.4, 0.6]
    assert group["0.7"]["retained"] == pytest.approx(0.98)
    assert group["0.7"]["parameter_sparsity"] == pytest.approx(0.6)
    assert points(content, "average")["0.7"]["parameter_sparsity"] == pytest.approx(0.6)
    assert group["0.6"]["status"] == "failed"
    # How many answers each level left unfinished.
    assert [group[level]["unfinished_items"] for level in ("dense", "0.9", "0.7")] == [1, 3, 7]
    assert points(content, "average")["0.7"]["unfinished_items"] == 7
    assert group["0.6"]["unfinished_items"] == 0
    assert group["0.6"]["parameter_sparsity"] is None
    # The average over accuracies is that of the one task; the loss stays out of it.
    assert points(content, "average")["0.7"]["value"] == group["0.7"]["value"]
    pages = points(content, "pages")
    assert pages["dense"]["value"] == pytest.approx(3)
    assert pages["0.7"]["added_loss"] == pytest.approx(1.5 * math.log(1.01))
    # The bar of 0.99 lies in the middle between sparsity 0.4 and 0.6 for both.
    assert critical(content, "group", 0.99)["value"] == pytest.approx(0.5)
    assert critical(content, "pages", 0.99)["value"] == pytest.approx(0.5)
    assert critical(content, "pages", 0.99)["bar_label"] == "PPL-1%"
    assert critical(content, "group", 0.99)["relation"] == "="
    assert critical(content, "group", 0.99)["paper_value"] == pytest.approx(0.4)
    assert critical(content, "group", 0.99)["chance"] == 0.25
    assert critical(content, "group", 0.99)["items"] == ITEMS
    assert critical(content, "pages", 0.99)["items"] == 20
    # 0.95 is crossed where the level failed.
    assert 0.6 <= critical(content, "group", 0.95)["value"] <= 0.8
    assert content["layers"]["0.8"] == {"intermediate": [0.4, 0.4]}
    assert content["layers"]["0.6"] == {}
    both = {phase: {"intermediate": [0.4, 0.4]} for phase in ("prompt", "generation")}
    assert content["phases"]["0.8"] == both
    assert content["phases"]["0.6"] == {}
    assert content["failures"] == [
        {"level": "0.6", "task": task, "reason": "NaN or infinity in 'intermediate' of layer 1"}
        for task in ("group", "pages")
    ]


def test_crossings_are_kept_for_pairs_of_models(tmp_path: Path) -> None:
    """Beside the scores at equal sparsity, where each replicate crosses a bar."""
    content = run(tmp_path)
    rows = read_crossings(tmp_path / "small" / "topp" / "intermediate" / "equal.parquet")
    assert [(one["task"], one["bar"]) for one in rows] == [
        (task, bar) for task in ("group", "pages", "average") for bar in (0.99, 0.95)
    ]
    for one in rows:
        known = critical(content, one["task"], one["bar"])
        # What lies beyond the measured sparsities is infinite here.
        assert np.clip(one["value"], 0.2, 0.6) == pytest.approx(known["value"])
        assert len(one["replicates"]) == 100
        finite = one["replicates"][np.isfinite(one["replicates"])]
        if not (known["low_open"] or known["high_open"]):
            assert known["interval_low"] <= np.median(finite) <= known["interval_high"]


def test_samples_are_told_apart_by_documents_and_tokens(tmp_path: Path) -> None:
    def samples(**changes: Any) -> dict[str, Any]:
        rows = [row("group", "a", item, SLOTS, 0) for item in range(3)]
        rows[1] |= changes
        return identity(pa.Table.from_pylist(rows, SCHEMA))

    first = samples()
    # What a model answers, and what it cost, is not what it was asked.
    assert samples(metrics=[("acc,none", 1.0)], nats=7.0, prompt_tokens=9) == first
    assert first["items"] == 3
    for changes in ({"doc_hash": "other"}, {"doc_id": 7}, {"leaf": "b"}, {"cluster": "c"}):
        assert samples(**changes)["documents"] != first["documents"], changes
        assert samples(**changes)["tokens"] == first["tokens"]
    other = samples(predicted=2)
    assert other["documents"] == first["documents"]
    assert other["tokens"] != first["tokens"]


def test_dense_zeros_are_those_of_the_site(tmp_path: Path) -> None:
    # The dense table counts every site; only the site of the curve belongs to its dense point.
    content = run(tmp_path, dense=(1, 0.6, 3.0))
    assert points(content, "group")["dense"]["sparsity"] == pytest.approx(0.1)


def test_dense_failed_on_one_task(tmp_path: Path) -> None:
    content = run(tmp_path, dense=(0, None, 3.0))
    assert {one["task"] for one in content["points"]} == {"pages"}
    assert content["failures"][0]["level"] == "dense"
    assert critical(content, "pages", 0.99)["value"] == pytest.approx(0.5)


def test_dense_failed_on_all(tmp_path: Path) -> None:
    content = run(tmp_path, levels={}, dense=(0, None, None))
    assert content["points"] == content["critical"] == content["levels"] == []
    assert len(content["failures"]) == 2


def test_a_search_that_chose_no_level(tmp_path: Path) -> None:
    content = run(tmp_path, levels={}, dense=(0, 0.0, None), tasks={"group": {}})
    assert [one["level"] for one in content["points"]] == ["dense", "dense"]
    assert {one["relation"] for one in content["critical"]} == {"none"}
    json.dumps(content, allow_nan=False)


def test_samples_that_differ_from_dense(tmp_path: Path) -> None:
    run(tmp_path)
    node = tmp_path / "small" / "topp" / "intermediate" / "0.8"
    header, table = read_table(node / "samples.parquet")
    rows = table.to_pylist()
    rows[7]["doc_hash"] = "another"
    by_task = {name: [one for one in rows if one["task"] == name] for name in header["tasks"]}
    tables = {name: pa.Table.from_pylist(some, SCHEMA) for name, some in by_task.items()}
    SampleTable(header["slots"], header["tasks"], tables).write(node / "samples.parquet")
    dense = NodeSamples(tmp_path / "small" / "dense", "intermediate")
    with pytest.raises(AtlasError, match=r"0\.8: samples of 'group' differ from the dense"):
        curve.task_samples("group", None, dense, [NodeSamples(node, "intermediate")])


def test_a_level_whose_metric_lacks_in_a_document(tmp_path: Path) -> None:
    """That level failed for the task; the others, and the other task, have their points."""
    run(tmp_path)
    node = tmp_path / "small" / "topp" / "intermediate" / "0.8"
    header, table = read_table(node / "samples.parquet")
    rows = table.to_pylist()
    lacking = next(one for one in rows if one["task"] == "group")
    lacking["metrics"] = []
    by_task = {name: [one for one in rows if one["task"] == name] for name in header["tasks"]}
    tables = {name: pa.Table.from_pylist(some, SCHEMA) for name, some in by_task.items()}
    SampleTable(header["slots"], header["tasks"], tables).write(node / "samples.parquet")
    dense = NodeSamples(tmp_path / "small" / "dense", "intermediate")
    nodes = {level: NodeSamples(node.parent / level, "intermediate") for level in LEVELS}
    samples = curve.all_samples(dense, nodes, SETTINGS)
    estimates = curve.estimate_all(samples, 100, 1)
    content = curve.build(dense, nodes, samples, estimates, SETTINGS, "intermediate")
    assert {
        **{"level": "0.8", "task": "group"},
        "reason": f"tasks.group: metric: 'acc,none' is missing in 1 of {ITEMS} documents; choose one that "
        "all of them have",
    } in content["failures"]
    failed = {(one["task"], one["level"]) for one in content["points"] if one["status"] == "failed"}
    assert failed == {
        *(("group", "0.8"), ("average", "0.8")),
        *((task, "0.6") for task in ("group", "pages", "average")),
    }


def test_clusters_are_resampled_together(tmp_path: Path) -> None:
    def clustered(folder: Path) -> None:
        header, table = read_table(folder / "samples.parquet")
        rows = table.to_pylist()
        for one in rows:
            one["cluster"] = f"c{one['doc_id'] % 5}"
        by_task = {name: [one for one in rows if one["task"] == name] for name in header["tasks"]}
        tables = {name: pa.Table.from_pylist(some, SCHEMA) for name, some in by_task.items()}
        SampleTable(header["slots"], header["tasks"], tables).write(folder / "samples.parquet")

    run(tmp_path)
    node = tmp_path / "small" / "topp" / "intermediate" / "0.8"
    clustered(tmp_path / "small" / "dense")
    clustered(node)
    dense = NodeSamples(tmp_path / "small" / "dense", "intermediate")
    samples = curve.task_samples("group", None, dense, [NodeSamples(node, "intermediate")])
    assert samples is not None
    assert samples.cluster is not None
    assert np.array_equal(samples.cluster, np.arange(ITEMS) % 5)


def test_the_summary_of_a_model(tmp_path: Path) -> None:
    run(tmp_path)
    model = tmp_path / "small" / "model.json"
    write_manifest(
        model,
        {"parameters": {"total": 1000, "non_embedding": 600}, "layers": 2, "name": "small"}
        | {"hidden": 10, "memory": {"vocabulary": 10}},
    )
    output = tmp_path / "small" / "summary.csv"
    arguments = ["model", "--model", model, "--curves"]
    arguments += [tmp_path / "small" / "topp" / "intermediate" / "curve.json", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x", *map(str, arguments)])
        summarize.main()
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {(one["task"], one["bar"]) for one in rows} == {
        (task, bar) for task in ("group", "pages", "average") for bar in ("0.99", "0.95")
    }
    (headline,) = (one for one in rows if (one["task"], one["bar"]) == ("pages", "0.99"))
    assert (headline["model"], headline["criterion"], headline["site"]) == (
        *("small", "topp", "intermediate"),
    )
    assert float(headline["value"]) == pytest.approx(0.5)
    assert headline["non_embedding_parameters"] == "600"
    # 2 × 10 entries meet 7 weights each, of 600 and a head of 100; half of them are zeros there.
    assert float(headline["ideal_speedup"]) == pytest.approx(1 / (1 - 0.5 * 140 / 700))
    for name, count in (("cut", "2"), ("unfinished", "1"), ("windowed", "0")):
        found = {one["task"]: one[f"{name}_items"] for one in rows}
        assert found == {"group": count, "pages": count, "average": count}


def two_tensors(folder: Path, zeros: dict[tuple[str, int], int], nats: float) -> None:
    """A node of both tensors in two layers, with these zeros a token; 20 documents of 10 tokens."""
    counts = [10 * zeros.get((tensor, layer), 0) for tensor, layer, _ in SLOTS]
    values = {"scoring_tokens": 10, "scoring_zeros": counts, "prompt_tokens": 0, "prompt_zeros": []}
    values |= {"generation_tokens": 0, "generation_zeros": [0] * len(SLOTS), "predicted": 10}
    rows = [row("pages", "pages", i, SLOTS, 0, **values, nats=10 * nats) for i in range(20)]
    result = {
        **{"status": "ok", "items": 20, "output_types": ["loglikelihood_rolling"]},
        "cut": {"items": 0, "tokens": 0, "windowed": 3, "windows": 23, "unfinished": 0},
        **{"leaves": ["pages"], "chance": None},
        "scores": {"pages": {"word_perplexity,none": math.exp(nats)}},
        "higher_is_better": {"pages": {"word_perplexity": False}},
        # An entry of x meets 20 weights in the first layer and 6 in the second, one of i meets 4.
        "sparsity": {"input": {"outputs": [20, 6]}, "intermediate": {"outputs": [4, 4]}},
    }
    table = SampleTable(SLOTS)
    table.tasks = {"pages": {"fingerprint": "f", "result": result}}
    table.rows = {"pages": pa.Table.from_pylist(rows, SCHEMA)}
    table.write(folder / "samples.parquet")
    write_manifest(folder / "eval.json", {"status": "ok", "tasks": {"pages": result}})


def test_equal_sparsity_is_read_over_parameters_too(tmp_path: Path) -> None:
    """Of 28 entries (4 + 10 a layer) and 80 + 24 + 40 + 40 = 184 products a token."""
    two_tensors(tmp_path / "dense", {}, 3.0)
    two_tensors(tmp_path / "0.8", {("input", 0): 4}, 3.1)  # 4 of 28; 80 of 184
    two_tensors(tmp_path / "0.5", {("input", 0): 4, ("input", 1): 4}, 3.4)  # 8 of 28; 104 of 184
    dense = NodeSamples(tmp_path / "dense", "all_inputs")
    nodes = {name: NodeSamples(tmp_path / name, "all_inputs") for name in ("0.8", "0.5")}
    assert dense.outputs("pages").tolist() == [20, 4, 6, 4]
    assert dense.weights("pages") == 184
    for of, wanted in (("entries", [4 / 28, 8 / 28]), ("parameters", [80 / 184, 104 / 184])):
        samples = curve.task_samples("pages", None, dense, list(nodes.values()), of)
        share = samples.zeros.sum(1) / samples.entries.sum(1)
        assert share.tolist() == pytest.approx(wanted)
    settings = {**SETTINGS, "tasks": {"pages": {}}}
    samples = curve.all_samples(dense, nodes, settings)
    estimates = curve.estimate_all(samples, settings["replicates"], settings["seed"])
    rows = curve.equal_of(dense, nodes, samples, estimates, settings)
    measured = {
        of: [one["sparsity"] for one in rows if one["sparsity_of"] == of and one["bar"] is None]
        for of in ("entries", "parameters")
    }
    # Between 0 and 43 % of the parameters nothing was measured.
    assert measured == {"entries": [0.05, 0.1, 0.15, 0.2, 0.25], "parameters": [0.45, 0.5, 0.55]}


def test_zeros_of_a_factor_spare_the_other_one_too(tmp_path: Path) -> None:
    """An entry of g that is zero leaves out its column of W_d, 7 weights, and its row of W_u, 7 more."""
    slots = [["gate", 0, 10], ["gate", 1, 10], ["intermediate", 0, 10], ["intermediate", 1, 10]]
    table = SampleTable(slots)
    table.rows = {"pages": pa.Table.from_pylist([row("pages", "pages", 0, slots, 0)], SCHEMA)}
    table.tasks = {"pages": {"fingerprint": "f", "result": {"status": "ok"}}}
    table.write(tmp_path / "samples.parquet")
    shares = {"gate": {"outputs": [7, 7]}, "intermediate": {"outputs": [7, 7]}}
    write_manifest(tmp_path / "eval.json", {"tasks": {"pages": {"sparsity": shares}}})
    assert NodeSamples(tmp_path, "gate").weights("pages") == 2 * 10 * 14
    assert NodeSamples(tmp_path, "intermediate").weights("pages") == 2 * 10 * 7


def test_one_tensor_has_one_sparsity(tmp_path: Path) -> None:
    run(tmp_path)
    found = read_equal(tmp_path / "small" / "topp" / "intermediate" / "equal.parquet")
    assert {one["sparsity_of"] for one in found} == {"entries"}


def test_parameters_weigh_each_tensor_by_its_readers() -> None:
    """x of 4 entries meets 8 weights each and i of 8 meets 2: half of x is twice half of i."""
    shares = {
        "input": {"zero_products": 2 * 8, "products": 4 * 8},
        "intermediate": {"zero_products": 0, "products": 8 * 2},
    }
    node = SimpleNamespace(
        ok=lambda task: task == "ran", manifest={"tasks": {"ran": {"sparsity": shares}}}
    )
    assert parameter_sparsity(node, "ran", "all_inputs") == 16 / 48
    assert parameter_sparsity(node, "ran", "input") == 0.5
    assert parameter_sparsity(node, "failed", "input") is None
