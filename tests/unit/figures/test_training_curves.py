"""Activation ratios over training tokens: what is drawn is what the tables say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.figures.studies import training_curves
from sparsity_atlas.figures.style import NothingToShow, arrange, styled
from sparsity_atlas.tables.read import Tables
from sparsity_atlas.tables.sparsing_law import PUBLISHED_FITS


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """A training that goes to a limit, and one of two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    models = {f"a-{n}": {"tolerance": 0.45 + 0.15 / n**1.5} for n in range(1, 7)}
    models |= {f"b-{n}": {"tolerance": 0.5, "activation": "relu"} for n in range(1, 3)}
    make_results(folder, models, criteria=["cett"], sites=["intermediate"])
    about = {name: Checkpoint(name[0], name[2:], 1e9 * 3.0 ** int(name[2:])) for name in models}
    return make_tables(folder, checkpoints=about)


def test_points_and_the_line_of_the_law(tables: Tables) -> None:
    with styled():
        figure = training_curves.training(tables)
    a, b = figure.axes
    assert a.get_title() == "a · cett · intermediate"
    rows = tables.training.query("task == 'prose' and bar == 0.99 and series == 'a'")
    points = rows[rows["law"] == ""]["ratio"].to_numpy()
    line = rows[rows["law"] == "power"]["ratio"].to_numpy()
    drawn = [np.asarray(one.get_ydata(), dtype=float) for one in a.lines]
    for wanted in (points, line):
        assert any(len(one) == len(wanted) and np.allclose(one, wanted) for one in drawn)
    (band,) = [one for one in a.collections if len(one.get_paths()[0].vertices) > 40]
    low = rows[rows["law"] == "power"]["ratio_low"].min()
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(low)
    assert "logspace: the ratio does not fall with training" in a.get_xlabel().replace("\n", " ")
    # Two points are shown, and no law.
    assert "2 points, and the law has 3 parameters" in b.get_xlabel().replace("\n", " ")
    assert {len(one.get_xdata()) for one in b.lines} <= {0, 2}


def test_what_is_said_below_a_panel_stays_within_it(tables: Tables) -> None:
    one = replace(
        tables,
        training=tables.training[tables.training["series"] == "b"],
        training_fits=tables.training_fits[tables.training_fits["series"] == "b"],
    )
    for some in (one, tables):
        with styled():
            figure = training_curves.training(some)
            arrange(figure)
            for ax in figure.axes:
                extent = ax.xaxis.label.get_window_extent()
                assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1


def test_the_law_that_is_shown(tables: Tables) -> None:
    fits = tables.training_fits.query("task == 'prose' and bar == 0.99 and series == 'a'")
    assert training_curves.shown_law(fits) == "power"
    # The other one only if it has a limit, and the activation's own is none at all.
    other = fits.assign(resolved=fits["law"] == "logspace", limit=np.nan)
    assert training_curves.shown_law(other) == "logspace"
    assert training_curves.shown_law(fits.assign(resolved=False, limit=np.nan)) == ""


def test_limits_stand_beside_the_published_ones(tables: Tables) -> None:
    told = tables.training_fits.assign(resolved=tables.training_fits["series"] == "a")
    with styled():
        figure = training_curves.limits(replace(tables, training_fits=told))
    size, shape = figure.axes
    own = told.query("task == 'prose' and bar == 0.99 and of_activation and series == 'a'").iloc[0]
    ends = [(float(one.get_xdata()[0]), float(one.get_ydata()[0])) for one in size.lines]
    assert (own["non_embedding_parameters"], own["limit"]) in ends
    assert {(one.billions * 1e9, one.limit) for one in PUBLISHED_FITS} < set(ends)
    assert [line.get_xdata()[0] for line in shape.lines] == [own["width_by_depth"]]
    assert "1 without a limit that can be told" in figure.get_supxlabel()


def test_nothing_to_show(tables: Tables) -> None:
    none = replace(tables, training=tables.training[:0], training_fits=tables.training_fits[:0])
    untold = replace(tables, training_fits=tables.training_fits.assign(resolved=False))
    for figure in (
        training_curves.training(none),
        training_curves.limits(none),
        training_curves.limits(untold),
    ):
        assert isinstance(figure, NothingToShow)
