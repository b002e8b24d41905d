"""Pairs of models, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsity_atlas.curves.equal_sparsity import write_equal
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.statistics.bootstrap import interval
from sparsity_atlas.tables.twins import twin_rows

SAMPLES = {"items": 30, "documents": "d", "tokens": "t"}
INSIDE = (0.2, 0.8)
Rows = dict[tuple[str, str, float | None], dict[str, Any]]


def write(
    results: Path,
    model: str,
    tasks: dict[str, dict[str, Any]],
    site: str = "input",
) -> Path:
    """A curve. Of each task: kind, dense score, `scores` by sparsity and `bars`, samples that are others."""
    folder = results / model / "topp" / site
    points, rows = [], []
    for task, about in tasks.items():
        kind = about.get("kind", "accuracy")
        for level, sparsity in (("dense", 0.0), ("0.9", INSIDE[0]), ("0.5", INSIDE[1])):
            points.append({"task": task, "kind": kind, "level": level, "sparsity": sparsity})
            points[-1]["value"] = about.get("dense", 0.5) if level == "dense" else None
        for name in ("sparsity", "bar"):
            for at, (value, replicates) in about.get(f"{name}s", {}).items():
                rows.append(
                    {"task": task, "kind": kind, "sparsity_of": "entries", "value": value}
                    | {"sparsity": None, "bar": None, "replicates": replicates}
                    | {name: at}
                )
    own = {task: SAMPLES | about.get("samples", {}) for task, about in tasks.items()}
    own.pop("average", None)
    write_manifest(folder / "curve.json", {"points": points, "samples": own})
    write_equal(folder / "equal_sparsity.parquet", rows)
    return folder / "curve.json"


def found(curves: list[Path], pairs: tuple[tuple[str, str], ...] = (("a", "b"),)) -> Rows:
    return {(row["task"], row["measure"], row["at"]): row for row in twin_rows(pairs, curves)}


DRAWN = list(np.linspace(0.85, 0.95, 40))


def scored(shift: float = 0.0, **other: Any) -> dict[str, Any]:
    return {"sparsitys": {0.3: (0.9 + shift, [one + shift for one in DRAWN])}, **other}


def test_scores_of_the_same_documents_are_paired(tmp_path: Path) -> None:
    """All that varies is common to both, and the difference does not."""
    rows = found(
        [
            write(tmp_path, "a", {"quiz": scored(dense=0.5)}),
            write(tmp_path, "b", {"quiz": scored(-0.02, dense=0.6)}),
        ]
    )
    row = rows["quiz", "score", 0.3]
    assert (row["first"], row["second"], row["site"]) == ("a", "b", "input")
    assert (row["first_value"], row["second_value"]) == (0.9, pytest.approx(0.88))
    for name in ("difference", "difference_low", "difference_high"):
        assert row[name] == pytest.approx(-0.02)
    assert row["paired"] is True
    assert row["note"] == ""
    dense = rows["quiz", "dense", None]
    assert (dense["first_value"], dense["second_value"]) == (0.5, 0.6)
    assert dense["difference"] == pytest.approx(0.1)


@pytest.mark.parametrize("other", [{"documents": "e"}, {"documents": "e", "items": 20}])
def test_of_other_documents_the_difference_has_the_noise_of_both(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    curves = [
        write(tmp_path, "a", {"quiz": scored()}),
        write(tmp_path, "b", {"quiz": scored(-0.02, samples=other)}),
    ]
    row = found(curves)["quiz", "score", 0.3]
    assert row["paired"] is False
    assert row["difference"] == pytest.approx(-0.02)
    assert row["difference_low"] < -0.05
    assert row["difference_high"] > 0.01
    assert found(curves)["quiz", "score", 0.3] == row


def test_without_replicates_there_is_no_interval(tmp_path: Path) -> None:
    curves = [
        write(tmp_path, name, {"quiz": {"sparsitys": {0.3: (value, [])}}})
        for name, value in (("a", 0.9), ("b", 0.8))
    ]
    row = found(curves)["quiz", "score", 0.3]
    assert row["difference"] == pytest.approx(-0.1)
    assert row["difference_low"] is row["difference_high"] is None


@pytest.mark.parametrize(
    ("first", "second", "relation", "difference"),
    [
        (0.4, 0.6, "=", 0.2),
        (0.4, math.inf, ">=", 0.4),
        (-math.inf, 0.6, ">=", 0.4),
        (-math.inf, math.inf, ">=", 0.6),
        (0.4, -math.inf, "<=", -0.2),
        (math.inf, 0.6, "<=", -0.2),
        (math.inf, -math.inf, "<=", -0.6),
        (math.inf, math.inf, "none", None),
        (-math.inf, -math.inf, "none", None),
    ],
)
def test_a_crossing_beyond_what_was_measured_bounds_the_difference(
    tmp_path: Path, first: float, second: float, relation: str, difference: float | None
) -> None:
    curves = [
        write(tmp_path, name, {"quiz": {"bars": {0.99: (value, [value] * 20)}}})
        for name, value in (("a", first), ("b", second))
    ]
    row = found(curves)["quiz", "critical", 0.99]
    assert row["label"] == "99%"
    assert row["relation"] == relation
    assert row["difference"] == (None if difference is None else pytest.approx(difference))
    assert row["first_value"] == np.clip(first, *INSIDE)
    assert row["low_open"] == (relation == "<=")
    assert row["high_open"] == (relation == ">=")


def test_crossings_are_paired_and_few_open_ones_leave_the_end_closed(tmp_path: Path) -> None:
    own = [0.3 + 0.01 * place for place in range(40)]
    others = [one + 0.05 for one in own[:-1]] + [math.inf]
    for count, opened in ((1, False), (2, True)):
        others[-count:] = [math.inf] * count
        curves = [
            write(tmp_path / str(count), "a", {"quiz": {"bars": {0.99: (0.5, own)}}}),
            write(tmp_path / str(count), "b", {"quiz": {"bars": {0.99: (0.55, others)}}}),
        ]
        row = found(curves)["quiz", "critical", 0.99]
        differences = np.clip(others, *INSIDE) - own
        ends = interval(0.05, differences)
        assert (row["difference_low"], row["difference_high"]) == pytest.approx(ends)
        assert (row["low_open"], row["high_open"]) == (False, opened)


def test_a_bound_is_no_loss(tmp_path: Path) -> None:
    """Of a causal and a masked-diffusion model it is compared where each rises by a percent."""
    about = {"bars": {0.99: (0.4, [0.4] * 20)}, "sparsitys": {0.3: (0.01, [0.01] * 20)}}
    curves = [
        write(tmp_path, "a", {"prose": {**about, "kind": "loss"}}),
        write(tmp_path, "b", {"prose": {**about, "kind": "bound"}}),
    ]
    rows = found(curves)
    assert list(rows) == [("prose", "critical", 0.99)]
    (row,) = rows.values()
    assert row["kind"] == "loss, bound"
    assert row["label"] == "PPL-1%, PPL-bound-1%"
    assert "no like numbers" in row["note"]


def test_other_tokens_are_said(tmp_path: Path) -> None:
    about = {"kind": "loss", "sparsitys": {0.3: (0.01, [0.01] * 20)}}
    curves = [
        write(tmp_path, "a", {"prose": about, "quiz": scored()}),
        write(
            tmp_path,
            "b",
            {
                "prose": {**about, "samples": {"tokens": "u"}},
                "quiz": scored(samples={"tokens": "u"}),
            },
        ),
    ]
    rows = found(curves)
    assert "other tokens" in rows["prose", "score", 0.3]["note"]
    assert rows["prose", "score", 0.3]["paired"]
    assert rows["quiz", "score", 0.3]["note"] == ""


def test_an_average_is_that_of_the_same_tasks(tmp_path: Path) -> None:
    def average(name: str, tasks: dict[str, dict[str, Any]]) -> Rows:
        folder = tmp_path / name
        both = {"quiz": scored(), "riddle": scored(), "average": scored()}
        return found([write(folder, "a", both), write(folder, "b", {**tasks, "average": scored()})])

    rows = average("less", {"quiz": scored()})
    assert {task for task, *_ in rows} == {"quiz"}
    rows = average("others", {"quiz": scored(), "riddle": scored(samples={"documents": "e"})})
    assert rows["quiz", "score", 0.3]["paired"]
    assert not rows["average", "score", 0.3]["paired"]
    rows = average("same", {"quiz": scored(), "riddle": scored()})
    assert rows["average", "score", 0.3]["paired"]


def test_pairs_meet_where_both_were_measured(tmp_path: Path) -> None:
    curves = [
        write(tmp_path, model, {"quiz": scored()}, site)
        for model, site in (
            ("a", "input"),
            ("a", "gate"),
            ("b", "up"),
            ("b", "input"),
            ("c", "gate"),
        )
    ]
    rows = list(twin_rows((("b", "a"), ("a", "c"), ("b", "c")), curves))
    places = {(row["first"], row["second"], row["site"]) for row in rows}
    assert places == {("b", "a", "input"), ("a", "c", "gate")}
    assert list(twin_rows((), curves)) == []
