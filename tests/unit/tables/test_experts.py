"""experts.csv: which rows there are, what their shares are of, and what is not made up."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fake_results import EACH, EXPERTS, LAYERS, LEVELS, make_results, make_tables, result_files
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.expert_table import NAME, read_table
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.tables import read, summarize

SITES = ("intermediate", "all_inputs")
TASKS = ["prose", "pairs"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A mixture beside a dense model."""
    models = {"routed": {"experts": True}, "dense-one": {}}
    return make_results(tmp_path / "results", models, sites=SITES)


def rows_of(results: Path) -> pd.DataFrame:
    make_tables(results)
    return pd.read_csv(results / "experts.csv", dtype={"level": str}, keep_default_na=False)


def test_every_expert_has_its_rows(results: Path) -> None:
    rows = rows_of(results)
    assert set(rows["model"]) == {"routed"}
    assert set(rows["level"]) == {"dense", *LEVELS}
    assert set(rows["task"]) == {*TASKS, "average"}
    assert set(zip(rows["site"], rows["tensor"], strict=True)) == {
        *(("intermediate", "intermediate"), ("all_inputs", "input")),
        ("all_inputs", "intermediate"),
    }
    assert set(rows[rows["task"] == "average"]["phase"]) == {""}
    assert set(rows[rows["task"] != "average"]["phase"]) == {"scoring"}
    assert len(rows) == 3 * (1 + len(LEVELS)) * (len(TASKS) + 1) * LAYERS * EXPERTS
    # Without tokens there is a load, of nothing, and no sparsity.
    unreached = rows[rows["tokens"] == 0]
    assert len(unreached) > 0
    assert set(unreached["load"].astype(float)) == {0.0}
    assert set(unreached["sparsity"]) == {""}


def test_shares_are_those_of_the_counts(results: Path) -> None:
    rows = rows_of(results)
    one = rows[(rows["site"] == "all_inputs") & (rows["level"] == "0.9")]
    table = read_table(results / "routed/topp/all_inputs/0.9" / NAME)
    by_task: dict[tuple[int, str, int], list[tuple[float, float | None]]] = defaultdict(list)
    for task in TASKS:
        counts = table.rows[task].to_pylist()
        routed: dict[tuple[int, str], int] = defaultdict(int)
        for row in counts:
            routed[row["layer"], row["tensor"]] += row["tokens"]
        own = one[one["task"] == task].set_index(["layer", "tensor", "expert"])
        for row in counts:
            key = row["layer"], row["tensor"], row["expert"]
            load = row["tokens"] / (routed[key[:2]] / EACH)
            sparsity = row["zeros"] / row["entries"] if row["tokens"] else None
            by_task[key].append((load, sparsity))
            assert own.loc[key, "tokens"] == row["tokens"]
            assert float(own.loc[key, "load"]) == pytest.approx(load)
            found = own.loc[key, "sparsity"]
            assert (float(found) if found else None) == pytest.approx(sparsity)
    mean = one[one["task"] == "average"].set_index(["layer", "tensor", "expert"])
    for key, values in by_task.items():
        known = [share for _, share in values if share is not None]
        assert float(mean.loc[key, "load"]) == pytest.approx(np.mean([one for one, _ in values]))
        if known:
            assert float(mean.loc[key, "sparsity"]) == pytest.approx(np.mean(known))


def test_dense_models_have_no_rows(tmp_path: Path) -> None:
    results = make_results(tmp_path, {"a": {}, "b": {}})
    tables = make_tables(results)
    assert tables.experts.empty
    assert (results / "experts.csv").read_text() == f"{','.join(summarize.EXPERTS)}\n"


def test_figures_read_what_stands_for_all_tasks(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "CHUNK", 7)
    found = make_tables(results).experts
    rows = rows_of(results)
    assert len(found) == (rows["task"] == "average").sum()
    assert set(found["task"]) == {"average"}


@pytest.mark.parametrize("how", ["gone", "of another run"])
def test_counts_that_are_not_there_are_not_left_out(results: Path, how: str) -> None:
    node = results / "routed/topp/intermediate/0.9"
    if how == "gone":
        (node / NAME).unlink()
        said = "no such file"
    else:
        manifest = read_manifest(node / "eval.json")
        manifest["fingerprints"]["pairs"] = "another"
        write_manifest(node / "eval.json", manifest)
        said = "has not the 'pairs' that eval.json tells of"
    with pytest.raises(AtlasError, match=rf"experts\.parquet: {said}"):
        summarize.write_tables(results, *result_files(results))


def test_a_task_that_failed_has_no_rows(results: Path) -> None:
    node = results / "routed/topp/intermediate/0.9"
    table = read_table(node / NAME)
    table.rows["pairs"] = table.rows["pairs"].slice(0, 0)
    table.write(node / NAME)
    rows = rows_of(results)
    own = rows[(rows["site"] == "intermediate") & (rows["level"] == "0.9")]
    assert set(own["task"]) == {"prose", "average"}
