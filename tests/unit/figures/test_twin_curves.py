"""Pairs of models as they are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.figures.style import NothingToShow
from sparsity_atlas.figures.twin_curves import twins

MODELS = {"base": {}, "tuned": {"tolerance": 0.7}, "other": {}}


def test_a_row_a_pair(tmp_path: Path) -> None:
    make_results(tmp_path, MODELS)
    tables = make_tables(tmp_path, pairs=[("base", "tuned"), ("other", "base")])
    rows = tables.twins
    assert set(rows["paired"]) == {True}
    figure = twins(tables)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["tuned − base", "prose, PPL-1%", "base − other", "prose, PPL-1%"]
    left, right = figure.axes[:2]
    own = rows[(rows["first"] == "base") & (rows["task"] == "prose") & (rows["site"] == "input")]
    scores = own[own["measure"] == "score"]
    # Behind the line at zero, the sites in their order.
    line = left.lines[2]
    assert list(line.get_xdata()) == list(scores["at"])
    assert list(line.get_ydata()) == pytest.approx(list(scores["difference"]))
    # It tolerates more, so it adds less loss.
    assert scores["difference"].iloc[-1] < 0
    bar = own[(own["measure"] == "critical") & (own["at"] == 0.99)].iloc[0]
    assert bar["difference"] > 0
    assert [text.get_text() for text in right.get_yticklabels()] == ["intermediate", "input"]
    points = [one for one in right.lines if len(one.get_xdata()) == 1]
    assert any(one.get_xdata()[0] == pytest.approx(bar["difference"]) for one in points)


def test_accuracies_alone_are_shown_by_their_average(tmp_path: Path) -> None:
    tasks = {name: {"kind": "accuracy", "chance": 0.5} for name in ("quiz", "riddle")}
    make_results(tmp_path, MODELS, sites=("input",), tasks=tasks)
    figure = twins(make_tables(tmp_path, pairs=[("base", "tuned")]))
    assert figure.axes[1].get_title() == "average, 99%"
    assert figure.axes[0].get_ylabel() == "retained accuracy (%)"


def test_where_no_scores_can_be_compared_a_panel_says_so(tmp_path: Path) -> None:
    make_results(tmp_path, MODELS, sites=("input",))
    tables = make_tables(tmp_path, pairs=[("base", "tuned")])
    # As of a loss beside a bound of one: only where each rises.
    rows = tables.twins[tables.twins["measure"] != "score"]
    left, right = twins(replace(tables, twins=rows)).axes[:2]
    assert not left.axison
    assert [text.get_text() for text in left.texts] == ["nothing to compare\nat equal sparsity"]
    assert left.get_title() == "tuned − base"
    assert right.lines


def test_no_pair_is_no_figure(tmp_path: Path) -> None:
    make_results(tmp_path, {"base": {}}, sites=("input",))
    assert isinstance(twins(make_tables(tmp_path)), NothingToShow)
