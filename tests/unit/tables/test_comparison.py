"""Scores at equal induced sparsity and their paired differences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from fake_results import (
    ENTRIES,
    make_results,
    make_tables,
    samples,
    write_curve,
    write_metrics,
    write_model,
)
from sparsity_atlas.curves.equal_sparsity import (
    SPARSITIES,
    at_sparsities,
    equal_rows,
    read_between,
    read_equal,
    write_equal,
)
from sparsity_atlas.curves.points import anchored_scores, estimate_all
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.figures import differences
from sparsity_atlas.figures.style import heading
from sparsity_atlas.statistics.bootstrap import TaskSamples, estimate, interval
from sparsity_atlas.tables.comparison import comparison_rows
from sparsity_atlas.tables.read import Tables
from sparsity_atlas.terms import confined


def test_a_curve_is_read_between_its_points() -> None:
    x, y = np.array([0.0, 0.2, 0.4, 0.6]), np.array([0.0, 1.0, 3.0, 9.0])
    found = read_between(x, y, [0, 0.2, 0.3, 0.6, 0.61, -0.1])
    assert found[[0, 1, 3]].tolist() == [0, 1, 9]
    assert 1 < found[2] < 2  # below the chord: damage grows faster and faster
    assert np.isnan(found[4:]).all()


@pytest.mark.parametrize(
    ("x", "y", "place", "value"),
    [
        ([0, 0.2, 0.4], [0, 1, math.inf], 0.1, "inside"),
        ([0, 0.2, 0.4], [0, 1, math.inf], 0.3, math.nan),
        ([0, 0.2, 0.4], [0, math.inf, 1], 0.4, math.nan),  # nothing beyond a level that failed
        ([0.3, 0.3, 0.9], [1, 1, 2], 0.3, 1),
        ([0.3, 0.3], [1, 1], 0.3, 1),
        ([0.3], [1], 0.4, math.nan),
        ([0, 0.65, 0.7], [0, 1, 2], 0.3, math.nan),  # nobody measured between 0 and 65 %
        ([0, 0.65, 0.7], [0, 1, 2], 0.65, 1),
        ([0, 0.302, 0.5], [0, 1, 2], 0.3, "inside"),  # 30 % as a row of 53 entries has it
        ([0, 0.32, 0.5], [0, 1, 2], 0.3, math.nan),
        ([0, 0.25, 0.5], [0, 1, 2], 0.4, 1.6),
    ],
)
def test_ends_of_a_curve(x: list, y: list, place: float, value: float | str) -> None:
    (found,) = read_between(np.array(x, float), np.array(y, float), [place])
    if value == "inside":
        assert 0 < found < 1
    else:
        assert found == pytest.approx(value, nan_ok=True)


def loss_samples(value: np.ndarray, sparsity: list[float], dense: np.ndarray) -> TaskSamples:
    """One loss task of documents with one token each."""
    zeros = np.repeat([[round(1000 * share)] for share in sparsity], len(dense), axis=1)
    return TaskSamples(
        task="prose",
        kind="loss",
        value=value,
        weight=np.ones(len(dense)),
        dense=dense,
        zeros=zeros,
        entries=np.full(zeros.shape, 1000),
    )


def test_added_loss_at_a_measured_sparsity_is_that_level_s() -> None:
    dense = np.random.default_rng(0).normal(4, 0.3, 50)
    value = dense + np.array([[0.01], [0.05], [0.2]])
    found = at_sparsities(estimate(loss_samples(value, [0.2, 0.4, 0.6], dense), 100))
    for place, wanted in ((0.2, 0.01), (0.4, 0.05), (0.6, 0.2)):
        assert found[:, SPARSITIES.index(place)] == pytest.approx(wanted)
    measured = np.isfinite(found[0])
    assert [s for s, ok in zip(SPARSITIES, measured, strict=True) if ok] == list(SPARSITIES[:12])
    assert np.isfinite(found[:, measured]).all()


def test_each_replicate_is_read_as_a_curve_of_its_own() -> None:
    """Against one interpolation a replicate; levels tie with dense and with each other in some of them."""
    rng = np.random.default_rng(2)
    dense = rng.normal(4, 0.3, 12)
    value = dense + np.array([[0.0], [0.05], [0.1], [np.inf]]) * rng.random(12)
    samples = loss_samples(value, [0.1, 0.2, 0.4, 0.6], dense)
    zeros = samples.zeros * (1 + (rng.random(12) < 0.1) * rng.random((4, 12)))
    zeros[:2] = np.where(rng.random(12) < 0.8, 100, zeros[:2])
    estimates = estimate(replace(samples, zeros=zeros.astype(int)), 200)
    found, scores = at_sparsities(estimates), anchored_scores(estimates)
    inside = np.isfinite(found[0])
    points = set()
    for row in range(1, 201):
        finite = np.isfinite(scores.fit[row])
        x, first = np.unique(scores.x[row][finite], return_index=True)
        y = np.arcsinh(-scores.fit[row][finite][first] / np.log(1.01))
        places = np.clip(np.array(SPARSITIES)[inside], x[0], x[-1])
        wanted = np.log(1.01) * np.sinh(PchipInterpolator(x, y)(places))
        assert found[row, inside] == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        points.add(len(x))
    assert len(points) > 1
    assert np.isnan(found[:, ~inside]).all()


def test_paired_differences_are_sharper_than_the_curves() -> None:
    """Two curves whose samples share their noise: the difference is known where neither curve is."""
    rng = np.random.default_rng(1)
    dense = rng.normal(4, 0.3, 60)
    noise = rng.normal(0, 0.3, 60)
    ends = {}
    for name, more in (("mild", 0.0), ("harsh", 0.02)):
        value = dense + np.array([[0.1], [0.2], [0.4]]) * (1 + noise) + more
        found = equal_rows([estimate(loss_samples(value, [0.2, 0.4, 0.6], dense), 500)])
        ends[name] = next(row for row in found if row["sparsity"] == 0.4)
    difference = np.array(ends["harsh"]["replicates"]) - np.array(ends["mild"]["replicates"])
    assert difference == pytest.approx(0.02)
    assert np.std(ends["mild"]["replicates"]) > 0.005


def by_key(results: Path) -> dict[tuple, dict]:
    found = [sorted(results.glob(f"*/*/*/{name}")) for name in ("curve.json", "sparsity.parquet")]
    rows = [row for row in comparison_rows(found[0], found[1]) if row["sparsity_of"] == "entries"]
    return {(row["criterion"], row["task"], row["sparsity"]): row for row in rows}


def curves(results: Path, levels: tuple[str, ...] = ("0.97", "0.9", "0.75", "0.5")) -> Path:
    write_model(results / "m")
    for criterion, tolerance in (("a", 0.5), ("b", 0.6)):
        task = samples("prose", "loss", levels, tolerance=tolerance)
        write_curve(results / "m" / criterion / "input", [task], levels)
    return results


def test_rows_of_the_table(tmp_path: Path) -> None:
    rows = by_key(curves(tmp_path))
    assert {row["reference"] for row in rows.values()} == {"a"}
    for place in (0.3, 0.5, 0.7):
        a, b = rows["a", "prose", place], rows["b", "prose", place]
        assert (a["difference"], a["difference_low"], a["difference_high"]) == (0, 0, 0)
        assert b["difference"] == pytest.approx(b["value"] - a["value"])
        assert b["difference_low"] <= b["difference"] <= b["difference_high"]
        # `b` tolerates more; at equal sparsity both have the same output error here.
        assert b["value"] <= a["value"]
        assert a["output_error"] == pytest.approx(1.1 * place**2, rel=0.02)
        assert b["output_error"] == a["output_error"]
    assert b["difference_high"] < 0
    assert b["value"] < a["value"]
    # Measured from 17 to 71 % of zeros; the dense point lies at 0.
    assert {key[2] for key in rows} == set(SPARSITIES[: SPARSITIES.index(0.7) + 1])
    assert ENTRIES == 1000


def test_a_place_that_the_reference_does_not_reach(tmp_path: Path) -> None:
    curves(tmp_path)
    levels = ("0.97", "0.9")
    write_curve(tmp_path / "m" / "a" / "input", [samples("prose", "loss", levels)], levels)
    rows = by_key(tmp_path)
    assert ("a", "prose", 0.5) not in rows
    row = rows["b", "prose", 0.5]
    assert row["value"] is not None
    assert row["difference"] is row["difference_low"] is None


def test_entries_and_parameters_are_compared_each_with_their_own(tmp_path: Path) -> None:
    levels = ("0.97", "0.9", "0.75", "0.5")
    write_model(tmp_path / "m")
    for criterion, tolerance in (("a", 0.5), ("b", 0.6)):
        task = samples("prose", "loss", levels, tolerance=tolerance)
        folder = tmp_path / "m" / criterion / "input"
        write_curve(folder, [task], levels)
        half = replace(task, zeros=task.zeros // 2)  # as if zeros met the smaller maps
        rows = [
            *equal_rows([estimate(task, 100)]),
            *equal_rows([estimate(half, 100)], "parameters"),
        ]
        write_equal(folder / "equal_sparsity.parquet", rows)
    found = [sorted(tmp_path.glob(f"*/*/*/{name}")) for name in ("curve.json", "sparsity.parquet")]
    rows = {
        (row["criterion"], row["sparsity_of"], row["sparsity"]): row
        for row in comparison_rows(found[0], found[1])
    }
    for place in (0.2, 0.3):
        for of in ("entries", "parameters"):
            a, b = rows["a", of, place], rows["b", of, place]
            assert b["difference"] == pytest.approx(b["value"] - a["value"])
            assert a["difference"] == 0
        assert rows["a", "parameters", place]["value"] == pytest.approx(
            rows["a", "entries", round(2 * place, 2)]["value"], rel=0.1
        )
        assert rows["a", "entries", place]["output_error"] is not None
        assert rows["a", "parameters", place]["output_error"] is None


def projected(results: Path) -> Path:
    """`a` and `b` at a site with one mask, and with one a map; `c` with one a map alone.

    Of the parameters `all_linear_inputs@projections` has half as many zeros as of the entries; `input` with
    either has one number for both.
    """
    levels = ("0.97", "0.9", "0.75", "0.5")
    write_model(results / "m")
    for criterion, tolerance in (("a", 0.5), ("b", 0.6), ("c", 0.7)):
        for site in ("all_linear_inputs", "input"):
            for each in (True, False) if criterion != "c" else (True,):
                better = tolerance + 0.05 * each
                task = samples("prose", "loss", levels, tolerance=better)
                folder = results / "m" / criterion / confined(site, (), each=each)
                write_curve(folder, [task], levels)
                if each and site == "all_linear_inputs":
                    half = replace(task, zeros=task.zeros // 2)
                    rows = equal_rows([estimate(task, 100)])
                    rows += equal_rows([estimate(half, 100)], "parameters")
                    write_equal(folder / "equal_sparsity.parquet", rows)
    return results


@pytest.mark.parametrize("site", ["all_linear_inputs", "input"])
def test_a_mask_for_each_map_beside_one_for_all(tmp_path: Path, site: str) -> None:
    projected(tmp_path)
    curves = [
        tmp_path / "m" / criterion / place / "curve.json"
        for place in (f"{site}@projections", site)
        for criterion in ("b", "a", "c")
        if place != site or criterion != "c"
    ]
    rows = [row for row in comparison_rows(curves, []) if row["reference_site"] != row["site"]]
    assert {(row["criterion"], row["reference"]) for row in rows} == {
        *(("a", "a"), ("a", "b"), ("b", "b"), ("c", "b")),
    }
    assert {(row["site"], row["reference_site"]) for row in rows} == {(f"{site}@projections", site)}
    assert {row["sparsity_of"] for row in rows} == {"parameters"}
    # Each replicate by itself, from the two files; a curve without rows of parameters has those of entries.
    of = "parameters" if site == "all_linear_inputs" else "entries"
    for row in rows:
        own, base = (
            next(
                one
                for one in read_equal(tmp_path / "m" / name / place / "equal_sparsity.parquet")
                if (one["sparsity_of"], one["sparsity"]) == (what, row["sparsity"])
            )
            if row["difference"] is not None
            else None
            for name, place, what in (
                (row["criterion"], row["site"], of),
                (row["reference"], row["reference_site"], "entries"),
            )
        )
        if own is None or base is None:
            continue
        assert row["value"] == own["value"]
        assert row["difference"] == own["value"] - base["value"]
        ends = interval(row["difference"], own["replicates"] - base["replicates"])
        assert (row["difference_low"], row["difference_high"]) == ends
    assert any(row["difference"] for row in rows)


def test_sites_of_single_layers_are_beside_the_same_layers(tmp_path: Path) -> None:
    levels = ("0.97", "0.5")
    write_model(tmp_path / "m")
    sites = ("input@projections@layers1", "input@layers1", "input@layers2", "input")
    for site in sites:
        write_curve(tmp_path / "m" / "a" / site, [samples("prose", "loss", levels)], levels)
    rows = list(comparison_rows([tmp_path / "m" / "a" / site / "curve.json" for site in sites], []))
    found = {(row["site"], row["reference_site"]) for row in rows}
    assert found == {("input@projections@layers1", "input@layers1")}


def test_one_criterion_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    make_results(tmp_path, models={"m": {}})
    assert by_key(tmp_path) == {}


def test_a_task_that_failed_has_no_rows(tmp_path: Path) -> None:
    levels = ("0.9", "0.5")
    task = samples("prose", "loss", levels, failed=levels)
    assert equal_rows(estimate_all([task], 100, 0)) == []


@pytest.mark.parametrize("content", [None, b"", b"no parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "equal_sparsity.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AtlasError, match=r"equal_sparsity\.parquet: (no such file|damaged)"):
        read_equal(path)


# Figures


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Two criteria at two sites of two models."""
    results = tmp_path_factory.mktemp("comparison")
    models = {"small": {"parameters": 10**5}, "large": {"parameters": 10**7}}
    make_results(results, models, criteria=("topp", "topk"))

    return make_tables(results, last="topk")


def test_the_figure_shows_the_table(tables: Tables) -> None:
    figure = differences.differences(tables)
    titles = [ax.get_title().replace("\n", " · ") for ax in figure.axes]
    assert titles == [
        f"{model} · {site} · − topp"
        for model in ("small", "large")
        for site in ("intermediate", "input")
    ]
    rows = tables.comparison.query(
        "model == 'large' and site == 'input' and criterion == 'topk' and task == 'prose'"
    ).dropna(subset="difference")
    drawn = [line for line in figure.axes[3].lines if len(line.get_xdata()) > 2]
    (line,) = drawn  # the reference's own difference is no line
    assert line.get_ydata().tolist() == rows["difference"].tolist()
    assert line.get_xdata().tolist() == rows["sparsity"].tolist()


def test_output_errors_of_every_criterion(tables: Tables) -> None:
    figure = differences.output_errors(tables)
    assert len(figure.axes) == 4
    rows = tables.comparison.query(
        "model == 'small' and site == 'intermediate' and task == 'prose'"
    )
    for criterion, line in zip(("topp", "topk"), figure.axes[0].lines, strict=True):
        wanted = rows[rows["criterion"] == criterion]["output_error"].dropna()
        assert line.get_ydata().tolist() == wanted.tolist()


def test_a_panel_of_masks_by_map(tmp_path: Path) -> None:
    results = projected(tmp_path)
    for site in ("input", "all_linear_inputs"):
        write_metrics(results / "m", site)
    tables = make_tables(results, last="c")
    figure = differences.differences(tables)
    assert [ax.get_title() for ax in figure.axes] == [
        heading("m", each, f"− {reference}")
        for site in ("input", "all_linear_inputs")
        for each, reference in (
            *((site, "a"), (f"{site}@projections", "a"), (f"{site}@projections", site)),
        )
    ]
    # `a` has a line beside itself there; `c` has none.
    rows = tables.comparison.query(
        "site == 'all_linear_inputs@projections' and reference_site != site"
    )
    lines = [line for line in figure.axes[-1].lines if len(line.get_xdata()) > 2]
    assert [line.get_ydata().tolist() for line in lines] == [
        rows.query(f"criterion == reference == '{name}'")["difference"].dropna().tolist()
        for name in ("a", "b")
    ]
