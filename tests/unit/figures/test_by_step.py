"""Figures over the steps of denoising."""

from __future__ import annotations

import pandas as pd
import pytest

from fake_results import LAYERS, make_results, make_tables
from sparsity_atlas.figures import by_step, style
from sparsity_atlas.tables.read import Tables

STEPS = 5
FIRST = "model == 'filled' and site == 'intermediate' and level == '0.75' and task == 'prose' and step >= 0"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """A masked-diffusion model beside a causal one."""
    models = {"filled": {"steps": STEPS}, "causal-one": {}}
    sites = ("intermediate", "all_inputs")
    return make_tables(make_results(tmp_path_factory.mktemp("steps"), models, sites=sites))


def means(tables: Tables, region: str, column: str) -> pd.Series:
    rows = tables.steps.query(FIRST)
    rows = rows[rows["region"] == region].dropna(subset=column)
    return rows.groupby("step")[column].mean()


def test_a_panel_for_each_tensor_and_task(tables: Tables) -> None:
    for draw in (by_step.sparsity, by_step.overlap):
        titles = [ax.get_title() for ax in draw(tables).axes]
        assert titles == [
            f"filled · {task}\n{what}topp 0.75"
            for what in ("intermediate, ", "all_inputs: intermediate\n", "all_inputs: input, ")
            for task in ("prose", "pairs")
        ]


def test_sparsity_of_each_region(tables: Tables) -> None:
    ax = by_step.sparsity(tables).axes[0]
    assert len(ax.lines) == len(by_step.REGIONS)
    for region, line, band in zip(by_step.REGIONS, ax.lines, ax.collections, strict=True):
        wanted = means(tables, region, "sparsity")
        assert list(line.get_xdata()) == list(wanted.index)
        assert list(line.get_ydata()) == pytest.approx(list(wanted))
        # From the sparsest layer to the densest.
        rows = tables.steps.query(FIRST)
        own = rows[(rows["region"] == region) & rows["sparsity"].notna()]
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(own["sparsity"].max())
        assert heights.min() == pytest.approx(own["sparsity"].min())


def test_overlap_with_both_steps(tables: Tables) -> None:
    ax = by_step.overlap(tables).axes[0]
    drawn = iter(ax.lines)
    for region in ("prompt", "answer"):
        for other in ("previous", "first"):
            wanted = means(tables, region, f"{other}_overlap")
            line = next(drawn)
            assert list(line.get_xdata()) == list(range(1, STEPS))
            assert list(line.get_ydata()) == pytest.approx(list(wanted))


def test_layer_by_step(tables: Tables) -> None:
    ax = by_step.by_layer(tables).axes[0]
    rows = tables.steps.query(FIRST)
    rows = rows[(rows["region"] == "answer") & (rows["step"] > 0)]
    wanted = 100 * rows.pivot(index="layer", columns="step", values="first_overlap")
    assert wanted.shape == (LAYERS, STEPS - 1)
    found = ax.collections[0].get_array()
    assert found is not None
    assert found.ravel().tolist() == pytest.approx(wanted.to_numpy().ravel().tolist())
    assert [one.get_text() for one in ax.get_xticklabels()] == ["1", "2", "3", "4"]


def test_causal_models_have_no_figure(tables: Tables) -> None:
    for draw in (by_step.sparsity, by_step.overlap, by_step.by_layer):
        assert isinstance(draw(tables.of("causal-one")), style.NothingToShow)
