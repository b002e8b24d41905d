"""The figure of what tells right answers draws what truthfulness.csv has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.figures.studies.truth_by_layer import truthfulness
from sparsity_atlas.figures.style import NothingToShow
from sparsity_atlas.tables.read import Tables

KEY = {"model": "m", "task": "pairs", "samples": 90.0, "right": 60.0, "reason": ""}


def row(predictor: str, auroc: float, **other: object) -> dict[str, object]:
    ends = {"low": auroc - 0.05, "high": auroc + 0.04}
    return {
        **KEY,
        "tensor": "",
        "node": "",
        "layer": np.nan,
        "predictor": predictor,
        "auroc": auroc,
    } | {
        **ends,
        **other,
    }


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("truth")
    make_results(folder, {"m": {}}, sites=("input",), levels=("0.9", "0.5"))
    return make_tables(folder)


def test_layers_and_what_has_none(tables: Tables) -> None:
    assert isinstance(truthfulness(tables), NothingToShow)
    dims = [
        row(kind, 0.5 + shift + layer / 20, tensor=tensor, layer=float(layer))
        for tensor, shift in (("residual", 0.0), ("input", 0.1))
        for kind in ("lid", "lid_geomle")
        for layer in range(4)
    ]
    others = [
        row("lid", 0.55, tensor="residual"),
        row("margin", 0.8),
        row("sparsity", 0.45, node="topp/input/0.9"),
        row("sparsity", 0.4, node="topp/gate/0.9"),
    ]
    failed = {**row("lid", np.nan), "reason": "too few"}
    made = replace(tables, truthfulness=pd.DataFrame([*dims, *others, failed]))
    figure = truthfulness(made)
    (ax,) = figure.axes
    assert ax.get_title() == "m · pairs\n60 of 90 right"
    lines = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert [list(line.get_ydata()) for line in lines] == [
        [0.5 + shift + layer / 20 for layer in range(4)] for shift in (0.0, 0.0, 0.1, 0.1)
    ]
    points = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in ax.lines
        if len(line.get_xdata()) == 1
    ]
    assert [y for _, y in points] == [0.55, 0.8, 0.45, 0.4]
    assert all(x > 3 for x, _ in points)
    # Each node has a mark of its own, which the legend names.
    drawn = [line.get_marker() for line in ax.lines if len(line.get_xdata()) == 1][1:]
    (legend,) = figure.legends
    named = {
        text.get_text(): line.get_marker()
        for text, line in zip(legend.texts, legend.legend_handles, strict=True)
    }
    sparsity = [f"induced sparsity,\ntopp/{site}/0.9" for site in ("input", "gate")]
    assert [named[name] for name in ("margin", *sparsity)] == drawn
    assert len(set(drawn)) == 3
    whiskers = [
        list(line.get_ydata())
        for line in ax.lines
        if len(line.get_xdata()) == 2 and line.get_xdata()[0] in [x for x, _ in points]
    ]
    assert whiskers == [[y - 0.05, y + 0.04] for _, y in points]


def test_one_node_needs_no_name(tables: Tables) -> None:
    rows = [row("margin", 0.8), row("sparsity", 0.45, node="topp/input/0.9")]
    (legend,) = truthfulness(replace(tables, truthfulness=pd.DataFrame(rows))).legends
    assert [text.get_text() for text in legend.texts][-2:] == ["margin", "induced sparsity"]


def test_a_task_of_one_kind_of_answers_says_so(tables: Tables) -> None:
    said = "all 30 answers are right"
    only = pd.DataFrame([{**row("", np.nan), "reason": said}])
    figure = truthfulness(replace(tables, truthfulness=only))
    assert isinstance(figure, NothingToShow)
    assert figure.texts[0].get_text() == said
