"""The slope of sparsity over model size, and when it counts as resolved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress, t

from sparsity_atlas.statistics.slopes import Scaling, SizePoint, fit_slope

SIZES = (10**5, 10**6, 10**7)


def fitted(rows, families) -> list[dict]:
    scaling = Scaling(families)
    for one in rows:
        scaling.add(one)
    return list(scaling.rows())


def points(values, half=0.01, sizes=SIZES) -> list[SizePoint]:
    return [
        SizePoint(size, value, value - half, value + half)
        for size, value in zip(sizes, values, strict=True)
    ]


def test_a_slope_is_per_tenfold_of_the_parameters():
    fit = fit_slope(points([0.30, 0.35, 0.40]))
    assert fit.slope == pytest.approx(0.05)
    assert fit.intercept + fit.slope * 6 == pytest.approx(0.35)
    assert fit.resolved
    assert fit.low < 0.05 < fit.high


def test_on_a_perfect_line_the_points_own_intervals_decide():
    fit = fit_slope(points([0.30, 0.35, 0.40], half=0.02))
    # The slope is (y3 - y1) / 2 here, so that its half-width is 0.02 √2 / 2.
    half = 0.02 / np.sqrt(2)
    assert 0 <= fit.high - fit.slope - half <= 0.001 * (1 + 1e-9)
    # The second digit of the half-width, 0.014, is that of the ends.
    assert (fit.low, fit.high) == (0.035, 0.065)
    wide = fit_slope(points([0.30, 0.35, 0.40], half=0.2))
    assert not wide.resolved
    assert wide.reason == "its interval spans zero"


def test_without_intervals_the_scatter_decides_by_students_t():
    values = [0.30, 0.36, 0.40]
    fit = fit_slope(points(values, half=0))
    reference = linregress(np.log10(SIZES), values)
    assert fit.slope == pytest.approx(reference.slope)
    half = t.ppf(0.975, 1) * reference.stderr
    assert half - 1e-12 <= fit.high - fit.slope <= 1.1 * half
    unknown = [
        SizePoint(size, value, None, None) for size, value in zip(SIZES, values, strict=True)
    ]
    assert fit_slope(unknown) == fit


@given(
    st.lists(st.floats(0.05, 0.95), min_size=3, max_size=12),
    st.floats(0, 0.2),
    st.integers(0, 2**32 - 1),
)
def test_the_interval_holds_the_slope_and_is_never_narrower_than_either_part(values, half, seed):
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in 10 ** rng.uniform(5, 10, len(values))]
    fit = fit_slope(points(values, half, sizes))
    if fit.slope is None:
        return
    x = np.log10(sizes)
    weight = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    assert fit.low <= fit.slope <= fit.high
    assert fit.high - fit.slope >= half * np.sqrt((weight**2).sum()) - 1e-12
    assert fit.resolved == (fit.low > 0 or fit.high < 0)


def test_two_models_make_no_trend():
    fit = fit_slope(points([0.1, 0.9], half=0.001, sizes=SIZES[:2]))
    assert fit.slope == pytest.approx(0.8)
    assert not fit.resolved
    assert fit.reason == "2 models"


def test_models_of_one_size_have_no_slope():
    fit = fit_slope(points([0.1, 0.5, 0.9], sizes=(7, 7, 7)))
    assert fit.slope is None
    assert not fit.resolved


def test_values_and_intervals_beyond_the_measured_make_no_line():
    good = points([0.30, 0.35, 0.40])
    beyond = [*good[:2], SizePoint(10**7, None, 0.3, 0.4)]
    assert not fit_slope(beyond).resolved
    # Also for the middle point, which has no weight in the slope.
    opened = [good[0], SizePoint(10**6, 0.35, 0.34, np.inf), good[2]]
    assert fit_slope(opened).reason == "an interval is open"


def row(model: str, parameters: int, value: float, **other) -> dict:
    return {
        "model": model, "criterion": "topp", "site": "input", "task": "prose", "bar": 0.99,
        "bar_label": "PPL-1%", "non_embedding_parameters": parameters, "value": value,
        "relation": "=", "interval_low": value - 0.01, "interval_high": value + 0.01,
        "low_open": False, "high_open": False, **other,
    }  # fmt: skip


def test_families_are_not_mixed_and_one_model_makes_no_row():
    rows = [
        *(row(f"m{i}", size, 0.3 + 0.05 * i) for i, size in enumerate(SIZES)),
        row("twin", 10**6, 0.9),
        row("m0", 10**5, 0.1, criterion="topk"),
    ]
    families = {"m0": "A, silu", "m1": "A, silu", "m2": "A, silu", "twin": "A, relu"}
    (only,) = fitted(rows, families)
    assert (only["family"], only["criterion"], only["models"]) == ("A, silu", "topp", 3)
    assert only["slope"] == pytest.approx(0.05)
    assert only["resolved"]


@pytest.mark.parametrize("change", [{"relation": ">="}, {"high_open": True}, {"low_open": True}])
def test_what_lies_beyond_the_measured_is_no_point(change):
    rows = [row(f"m{i}", size, 0.3 + 0.05 * i) for i, size in enumerate(SIZES)]
    rows[1] |= change
    (only,) = fitted(rows, dict.fromkeys(("m0", "m1", "m2"), "A"))
    assert not only["resolved"]
