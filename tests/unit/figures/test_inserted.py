"""Figures of texts before prompts draw what their tables have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.figures.draw import draw_all
from sparsity_atlas.figures.studies import inserted
from sparsity_atlas.figures.style import NothingToShow, arrange, shows_nothing, styled
from sparsity_atlas.tables.read import Tables


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("inserted")
    make_results(folder, {"m": {}}, sites=("gate",), levels=("0.75", "0.5"))
    made = make_tables(folder)
    key = {"model": "m", "criterion": "topp", "site": "gate"}
    scores = [
        {**key, "level": level, "task": f"{task}_behind", "before": task, "kind": kind}
        | {"difference": difference, "low": difference - 0.01, "high": difference + 0.01}
        for task, kind in (("prose", "loss"), ("pairs", "accuracy"))
        for level, difference in (("dense", 0.1), ("0.75", 0.2), ("0.5", 0.3))
    ]
    gates = [
        {"model": "m", "task": "pairs_behind", "part": "ffn", "layer": layer, "quantity": quantity}
        | {"value_before": 2.0, "difference": 0.2 * layer, "low": 0.0, "high": 1.0}
        for layer in (0, 1)
        for quantity in ("near_zero", "l1", "l2", "gini")
    ]
    return replace(made, inserted=pd.DataFrame(scores), inserted_gates=pd.DataFrame(gates))


def lines(ax: Any) -> list[list[tuple[float, float]]]:
    found = [line for line in ax.lines if line.get_marker() not in ("None", None)]
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in found]


def test_differences_over_the_sparsity_without_the_text(tables: Tables) -> None:
    axes = inserted.scores(tables).axes
    assert [ax.get_title().splitlines() for ax in axes] == [
        ["m", "topp · gate", "accuracy (points)"],
        ["m", "topp · gate", "added loss (nats)"],
    ]
    for ax in axes:
        (line,) = [one for one in lines(ax) if one]
        assert [x for x, _ in line] == pytest.approx([0, 0.5, 0.5**0.5], abs=0.01)
        assert [y for _, y in line] == pytest.approx([0.1, 0.2, 0.3])


def test_titles_of_long_names_lie_apart(tables: Tables) -> None:
    """`weighted_threshold` at `intermediate` ran into the next panel."""
    longer = {"criterion": "weighted_threshold", "site": "intermediate"}
    frames = {name: getattr(tables, name).assign(**longer) for name in ("inserted", "curves")}
    with styled():
        figure = inserted.scores(replace(tables, **frames))
        arrange(figure)
        left, right = (ax.title.get_window_extent() for ax in figure.axes)
    assert left.x1 < right.x0


def test_one_layer_alone_is_drawn_where_nothing_else_is(tables: Tables, tmp_path: Path) -> None:
    """As of ARM in the first layer; figures of several curves leave such out."""
    frames = {
        name: getattr(tables, name).assign(site="gate@layers0") for name in ("inserted", "curves")
    }
    draw_all(replace(tables, **frames), tmp_path, ["inserted"])
    assert not shows_nothing((tmp_path / "inserted.svg").read_bytes())


def test_gates_as_shares_of_what_they_were(tables: Tables) -> None:
    (ax,) = inserted.gates(tables).axes
    assert lines(ax) == [[(0.0, 0.0), (1.0, 0.1)]] * 4


def test_nothing_without_such_tasks(tables: Tables) -> None:
    none = replace(tables, inserted=tables.inserted[:0], inserted_gates=tables.inserted_gates[:0])
    assert isinstance(inserted.scores(none), NothingToShow)
    assert isinstance(inserted.gates(none), NothingToShow)
