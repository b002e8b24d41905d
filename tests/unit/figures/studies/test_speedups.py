"""Figures of measured times show the rows of the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fake_results import make_results, make_tables
from fake_speed import write_speed
from sparsity_atlas.figures import style
from sparsity_atlas.figures.studies import speedups
from sparsity_atlas.tables.read import Tables


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    results = make_results(tmp_path_factory.mktemp("results"), {"small": {}}, replicates=20)
    write_speed(results / "small/topp/input")
    write_speed(results / "small/topp/intermediate", timed=("ffn",), tokens=(1,))
    return make_tables(results)


def lines(ax: object) -> list[tuple[list[float], list[float]]]:
    return [(list(one.get_xdata()), list(one.get_ydata())) for one in ax.get_lines()]


def test_speedups_over_sparsity_beside_the_ideal_with_the_curves_own_point(tables: Tables) -> None:
    with style.styled():
        figure = speedups.whole(tables)
    (ax,) = figure.axes
    ideal, found, dot, fixed, fixed_dot, _ = lines(ax)
    shares = [step / 10 for step in range(10)]
    # Whole tokens of one, of which half of the weights meet the zeros.
    assert ideal[0] == pytest.approx(shares)
    assert ideal[1] == pytest.approx([1 / (1 - one / 2) for one in shares])
    assert np.interp(0.7, *found) == pytest.approx(100 / (65 + 10))
    assert np.interp(0.7, *fixed) == pytest.approx(100 / 65)
    assert (dot[0], dot[1]) == ([0.4], [pytest.approx(100 / 90)])
    assert fixed_dot[1] == [pytest.approx(100 / 80)]
    assert "Some GPU" in figure._supxlabel.get_text()


def test_each_kind_of_maps_has_a_panel(tables: Tables) -> None:
    with style.styled():
        figure = speedups.parts(tables)
    titles = [ax.get_title() for ax in figure.axes]
    assert [one.splitlines()[-1] for one in titles] == [
        "topp, input: ffn",
        "topp, intermediate: ffn",
    ]


def test_machines_are_told_apart(tables: Tables) -> None:
    rows = tables.speed
    one = rows["site"] == "input"
    made = replace(tables, speed=rows.assign(device=rows["device"].where(one, "Some CPU")))
    with style.styled():
        figure = speedups.parts(made)
    titles = [ax.get_title().splitlines()[-1] for ax in figure.axes]
    assert titles == ["topp, input: ffn (a)", "topp, intermediate: ffn (b)"]
    assert "(a) Some GPU, bfloat16; (b) Some CPU, bfloat16" in figure._supxlabel.get_text()


def test_over_tokens_whole_ones_are_shown(tables: Tables) -> None:
    with style.styled():
        figure = speedups.batch(tables)
    (ax,) = figure.axes
    half, most, dots, *_ = lines(ax)
    assert half[0] == [1, 2, 4]
    # 100 over 100 less half of s^B, and what finding takes.
    assert half[1] == pytest.approx([100 / (110 - 50 * 0.5**count) for count in (1, 2, 4)])
    assert most[1] == pytest.approx([100 / (110 - 50 * 0.9**count) for count in (1, 2, 4)])
    assert dots[1] == pytest.approx([100 / (110 - 50 * 0.4**count) for count in (1, 2, 4)])


def test_panels_name_all_numbers_of_tokens(tables: Tables) -> None:
    rows = tables.speed[tables.speed["site"] == "input"]
    other = rows[rows["tokens"] < 4].assign(site="gate")
    more = rows.assign(tokens=rows["tokens"] * 4)
    with style.styled():
        figure = speedups.batch(replace(tables, speed=pd.concat([rows, more, other])))
    named = [[int(one) for one in ax.xaxis.get_majorticklocs()] for ax in figure.axes]
    assert named == [[1, 2, 4, 8, 16]] * 2


def test_nothing_is_drawn_of_a_run_without_times(tmp_path: Path) -> None:
    tables = make_tables(make_results(tmp_path, {"small": {}}, replicates=20))
    for draw in (speedups.whole, speedups.parts, speedups.batch):
        assert isinstance(draw(tables), style.NothingToShow)
