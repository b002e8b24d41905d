"""Figures of neighbouring tokens' masks and of their predictors draw what masks.csv has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.figures.studies import cett_curve, local_dimension, neurons, recall
from sparsity_atlas.figures.style import NothingToShow
from sparsity_atlas.tables.read import Tables

LEVELS = ("0.97", "0.75", "0.1")  # Sparsities of 0.17, 0.5 and 0.95.


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("neurons")
    make_results(folder, {"m": {}}, sites=("intermediate", "input"), levels=LEVELS)
    return make_tables(folder)


@pytest.mark.parametrize(
    ("draw", "quantity"),
    [
        (neurons.unused, "unused"),
        (neurons.reuse, "reuse"),
        (neurons.position, "sparsity"),
        (neurons.frequency, "frequency"),
    ],
)
def test_the_level_nearest_to_one_half_is_drawn(tables: Tables, draw, quantity: str) -> None:
    (ax,) = draw(tables).axes
    assert "topp 0.75" in ax.get_title()
    rows = tables.masks
    rows = rows[(rows["level"] == "0.75") & (rows["quantity"] == quantity)]
    lines = [line for line in ax.lines if line.get_marker() not in ("None", None)]
    assert len(lines) == 2
    for site, line in zip(("intermediate", "input"), lines, strict=True):
        own = rows[rows["site"] == site].sort_values("at")
        np.testing.assert_allclose(line.get_xdata(), own["at"])
        np.testing.assert_allclose(line.get_ydata(), own["value"])


def test_independent_tokens_leave_the_sparsity_to_the_power_of_their_number(tables: Tables) -> None:
    (ax,) = neurons.unused(tables).axes
    rows = tables.masks
    chance = rows[(rows["level"] == "0.75") & (rows["quantity"] == "unused")]
    chance = chance[chance["site"] == "input"].sort_values("at")["independent"].to_numpy()
    dashed = [line.get_ydata() for line in ax.lines if line.get_linestyle() == "--"]
    assert any(len(line) == len(chance) and np.allclose(line, chance) for line in dashed)


def test_recall_is_drawn_over_the_rank(tables: Tables) -> None:
    assert isinstance(recall.recall(tables), NothingToShow)
    key = {"model": "m", "criterion": "topp", "site": "intermediate", "tensor": "intermediate"}
    made = pd.DataFrame(
        [
            {**key, "level": level, "quantity": f"recall_by_{name}", "at": rank}
            | {"value": rank / 16, "low": rank / 20, "high": rank / 16, "independent": 0.5}
            for level in LEVELS
            for name in ("weights", "probe")
            for rank in (2, 8, 16)
        ]
    )
    (ax,) = recall.recall(replace(tables, masks=pd.concat([tables.masks, made]))).axes
    assert "topp 0.75" in ax.get_title()
    measured = [line for line in ax.lines if line.get_marker() not in ("None", None)]
    assert [line.get_ydata().tolist() for line in measured] == [[2 / 16, 8 / 16, 1]] * 2


def test_cett_is_drawn_over_the_share_below_each_threshold_once_a_model(tables: Tables) -> None:
    assert isinstance(cett_curve.cett(tables), NothingToShow)
    key = {"model": "m", "site": "intermediate", "tensor": "intermediate", "level": "dense"}
    made = pd.DataFrame(
        [
            {**key, "criterion": criterion, "quantity": quantity, "at": at, "value": value}
            for criterion in ("topp", "topk")
            for at, share, lost in ((0.1, 0.6, 0.3), (0.01, 0.2, 0.05))
            for quantity, value in (("cett_sparsity", share), ("cett", lost))
        ]
    )
    (ax,) = cett_curve.cett(replace(tables, masks=pd.concat([tables.masks, made]))).axes
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[0.2, 0.05], [0.6, 0.3]]


def test_local_dimension_is_drawn_where_it_was_estimated(tables: Tables) -> None:
    assert isinstance(local_dimension.local_dimension(tables), NothingToShow)
    metrics = tables.metrics.assign(lid=tables.metrics["layer"] + 3.0, lid_geomle=9.0)
    (ax,) = local_dimension.local_dimension(replace(tables, metrics=metrics)).axes
    assert [3, 4, 5] in [line.get_ydata().tolist() for line in ax.lines]
