"""Tables of many curves: one curve in memory at a time, all files whole or none."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_results import make_results, make_tables, result_files
from sparsity_atlas.files.csv import write_side_by_side
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.tables import summarize

SITES = ("intermediate", "input")
CRITERIA = ("topp", "topk", "maxp")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve curves."""
    models = {"small": {"parameters": 10**6}, "large": {"parameters": 10**7}}
    return make_results(tmp_path_factory.mktemp("results"), models, criteria=CRITERIA, sites=SITES)


def test_one_curve_is_in_memory_at_a_time(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(dict):
        """A manifest that says when it is gone."""

    alive: weakref.WeakValueDictionary[int, Watched] = weakref.WeakValueDictionary()
    most = 0

    def read(path: Path) -> dict[str, Any]:
        nonlocal most
        content = Watched(read_manifest(path))
        if path.name == "curve.json":
            alive[id(content)] = content
            most = max(most, len(alive))
        return content

    monkeypatch.setattr(summarize, "read_manifest", read)
    summarize.write_tables(tmp_path, *result_files(results))
    # The last one is let go when the next is read.
    assert most <= 2


def test_the_command_writes_the_same_tables(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summarize.write_tables(tmp_path, *result_files(results))
    folded = [[["large", "small"], [[name, sorted(SITES)] for name in sorted(CRITERIA)]]]
    arguments = ["tables", "--curves", json.dumps(folded), "--studies", json.dumps(folded)]
    arguments += ["--results", str(results)]
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    summarize.main()
    written = sorted(path.name for path in tmp_path.glob("*.csv"))
    assert written == sorted(path.name for path in results.glob("*.csv"))
    for name in written:
        assert (results / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_mixture_brings_the_active_parameters(results: Path, tmp_path: Path) -> None:
    """A mixture is compared by what a token meets; a table of dense models has no column for that."""
    sizes = {"small": {"parameters": 10**6}, "middle": {"parameters": 10**7, "active": 10**6 // 2}}
    make_results(tmp_path, sizes | {"large": {"parameters": 10**7}}, sites=SITES)
    tables = make_tables(tmp_path)
    active = {"small": 10**6, "middle": 10**6 // 2, "large": 10**7}
    for frame in (tables.models, tables.critical_sparsity):
        found = frame.groupby("model")["active_non_embedding_parameters"].unique()
        assert {model: list(one) for model, one in found.items()} == {
            model: [number] for model, number in active.items()
        }
        assert (frame["active_parameters"] == 2 * frame["active_non_embedding_parameters"]).all()
    assert tables.by_size() == ["middle", "small", "large"]
    points = tables.critical_sparsity.query("criterion == 'topp' and site == 'input'")
    points = points[(points["task"] == "prose") & (points["bar"] == 0.99)]
    line = tables.scaling.query("site == 'input' and task == 'prose' and bar == 0.99").iloc[0]
    x = np.log10([active[model] for model in points["model"]])
    assert line["slope"] == pytest.approx(np.polyfit(x, points["value"], 1)[0])
    dense = make_tables(results)
    assert not any("active" in name for name in [*dense.models, *dense.critical_sparsity])


def test_tables_side_by_side_are_all_whole_or_all_as_before(tmp_path: Path) -> None:
    columns = {"a.csv": ["x"], "b.csv": ["y"]}
    write_side_by_side(tmp_path, columns, lambda tables: tables["a.csv"].add([{"x": 1}]))
    assert (tmp_path / "a.csv").read_text() == "x\n1\n"
    assert (tmp_path / "b.csv").read_text() == "y\n"

    def fail(tables: dict) -> None:
        tables["a.csv"].add([{"x": 2}])
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        write_side_by_side(tmp_path, columns, fail)
    assert (tmp_path / "a.csv").read_text() == "x\n1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]
