"""Curves of single layers are drawn against their layer, and hide no other figure's panels."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from fake_results import make_results, make_tables
from sparsity_atlas.figures import draw
from sparsity_atlas.figures.studies.single_layers import single_layers
from sparsity_atlas.figures.style import NothingToShow, styled
from sparsity_atlas.tables.read import Tables, in_order

SITES = ("input", "input@layers0-1", *(f"input@layers{number}" for number in (0, 2, 10)))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("results")
    make_results(folder, models={"m": {}}, sites=SITES, levels=("0.9", "0.5"))
    return make_tables(folder)


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def test_layers_stand_in_the_order_of_their_numbers(tables: Tables) -> None:
    assert in_order(reversed(SITES)) == [
        *("input", "input@layers0", "input@layers0-1", "input@layers2", "input@layers10")
    ]
    assert set(tables.without_single_layers().curves["site"]) == {"input", "input@layers0-1"}
    assert len(tables.without_single_layers().models) == len(tables.models) == 1


def test_a_line_has_the_tables_numbers(tables: Tables) -> None:
    with styled():
        figure = single_layers(tables)
    task = tables.loss_task()
    assert titles(figure) == [f"m · topp\ninput · {one}" for one in (task, "average")]
    for ax, one, column in zip(
        figure.axes, (task, "average"), ("added_loss", "retained"), strict=True
    ):
        rows = tables.curves[tables.curves["task"] == one]
        for level, line in zip(("0.9", "0.5"), ax.lines, strict=False):
            assert list(line.get_xdata()) == [0, 2, 10]
            own = rows[rows["level"] == level].set_index("site")[column]
            assert list(line.get_ydata()) == [own[f"input@layers{number}"] for number in (0, 2, 10)]


def test_one_layer_and_none_show_nothing(tables: Tables) -> None:
    one = tables.curves["site"].isin(["input", "input@layers2"])
    with styled():
        for rows in (tables.curves[one], tables.curves[:0]):
            left = {**vars(tables), "curves": rows}
            assert isinstance(single_layers(Tables(**left)), NothingToShow)


def test_other_figures_are_drawn_without_them(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, pd.DataFrame] = {}

    def note(name: str):
        return lambda given: seen.update({name: given.curves}) or Figure()

    for name in ("added_loss", "single_layers"):
        monkeypatch.setitem(draw.DRAW, name, note(name))
    draw.draw_all(tables, tmp_path, ("added_loss", "single_layers"))
    assert set(seen["single_layers"]["site"]) == set(SITES)
    assert set(seen["added_loss"]["site"]) == {"input", "input@layers0-1"}
