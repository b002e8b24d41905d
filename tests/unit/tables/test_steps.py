"""steps.csv: which rows there are, what their shares are of, and what is not made up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fake_results import LAYERS, LEVELS, make_results, make_tables, result_files
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.step_table import NAME, read_table
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.sparsify.step_sums import UNIT
from sparsity_atlas.tables import steps, summarize

SITES = ("intermediate", "all_inputs")
TASKS = ["prose", "pairs"]
COUNT = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked-diffusion model beside a causal one."""
    models = {"filled": {"steps": COUNT}, "causal-one": {}}
    return make_results(tmp_path_factory.mktemp("made") / "results", models, sites=SITES)


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(made, tmp_path / "results")


def rows_of(results: Path) -> pd.DataFrame:
    make_tables(results)
    return pd.read_csv(results / "steps.csv", dtype=str, keep_default_na=False)


def test_every_step_has_its_rows(results: Path) -> None:
    rows = rows_of(results)
    assert list(rows) == summarize.STEPS
    assert set(rows["model"]) == {"filled"}
    assert set(rows["level"]) == set(LEVELS)
    assert set(rows["task"]) == set(TASKS)
    assert set(zip(rows["site"], rows["tensor"], strict=True)) == {
        *(("intermediate", "intermediate"), ("all_inputs", "input")),
        ("all_inputs", "intermediate"),
    }
    assert set(rows["step"]) == {"", *map(str, range(COUNT))}
    assert set(rows[rows["step"] == ""]["region"]) == {"prompt", "answer"}
    assert len(rows) == 3 * len(LEVELS) * len(TASKS) * LAYERS * (5 * COUNT + 2)


def overlap(both: int, one: int, other: int) -> float:
    return both / (one + other - both)


def test_shares_are_those_of_the_counts(results: Path) -> None:
    rows = rows_of(results).set_index(["site", "level", "task", "step", "layer", "region"])
    table = read_table(results / "filled/topp/intermediate/0.9" / NAME)
    for task in TASKS:
        for one in table.rows[task].to_pylist():
            step = "" if one["step"] is None else str(one["step"])
            key = ("intermediate", "0.9", task, step, str(one["layer"]), one["region"])
            found = rows.loc[key]
            wanted: dict[str, float | None] = {
                "sparsity": 1 - one["kept"] / one["entries"] if one["entries"] else None,
                "unused": None,
                "always": None,
            }
            if one["neurons"]:
                wanted["unused"] = one["frequency_0"] / one["neurons"]
                wanted["always"] = one["frequency_11"] / one["neurons"]
            for other in ("previous", "first"):
                names = (f"{other}_overlap", f"{other}_token_overlap", f"{other}_used_overlap")
                wanted |= dict.fromkeys(names)
                there = one[f"{other}_kept"]
                if there is not None and one["tokens"]:
                    wanted[names[0]] = overlap(one[f"{other}_both"], one["kept"], there)
                    wanted[names[1]] = one[f"{other}_jaccard"] / UNIT / one["tokens"]
                    if one["neurons"]:
                        used = one[f"{other}_used_both"], one["used"], one[f"{other}_used"]
                        wanted[names[2]] = overlap(*used)
            for name, value in wanted.items():
                assert (float(found[name]) if found[name] else None) == pytest.approx(value), name


def test_masks_that_keep_nothing_are_the_same() -> None:
    row: dict[str, Any] = {"step": 1, "tokens": 3, "entries": 12, "neurons": 4, "kept": 0}
    row |= {"used": 0, "frequency_0": 4, "frequency_11": 0}
    for other in ("previous", "first"):
        row |= {f"{other}_{name}": 0 for name in ("kept", "both", "used", "used_both")}
        row[f"{other}_jaccard"] = 3 * UNIT
    (found,) = steps._with_shares(pd.DataFrame([row])).to_dict("records")
    assert found["sparsity"] == found["unused"] == 1
    assert [value for name, value in found.items() if name.endswith("overlap")] == [1.0] * 6


def test_of_many_steps_some_are_shown(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both ends, and all of them together."""
    monkeypatch.setattr(steps, "MOST", 3)
    assert set(rows_of(results)["step"]) == {"", "0", "2", "3"}


def test_causal_models_have_no_rows(tmp_path: Path) -> None:
    results = make_results(tmp_path, {"a": {}})
    assert make_tables(results).steps.empty
    assert (results / "steps.csv").read_text() == f"{','.join(summarize.STEPS)}\n"


def test_a_node_that_counts_no_steps_has_no_rows(results: Path) -> None:
    for level in LEVELS:
        node = results / "filled/topp/intermediate" / level
        (node / NAME).unlink()
        write_manifest(node / "eval.json", {"tasks": {}})
    assert set(rows_of(results)["site"]) == {"all_inputs"}


@pytest.mark.parametrize("how", ["gone", "of another run"])
def test_counts_that_are_not_there_are_not_left_out(results: Path, how: str) -> None:
    node = results / "filled/topp/intermediate/0.9"
    if how == "gone":
        (node / NAME).unlink()
        said = "no such file"
    else:
        manifest = read_manifest(node / "eval.json")
        manifest["fingerprints"]["pairs"] = "another"
        write_manifest(node / "eval.json", manifest)
        said = "has not the 'pairs' that eval.json tells of"
    with pytest.raises(AtlasError, match=rf"steps\.parquet: {said}"):
        summarize.write_tables(results, *result_files(results))


def test_a_task_without_generation_has_no_rows(results: Path) -> None:
    node = results / "filled/topp/intermediate/0.9"
    table = read_table(node / NAME)
    table.rows["pairs"] = table.rows["pairs"].slice(0, 0)
    table.write(node / NAME)
    rows = rows_of(results)
    own = rows[(rows["site"] == "intermediate") & (rows["level"] == "0.9")]
    assert set(own["task"]) == {"prose"}
