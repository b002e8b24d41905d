"""The choice of levels on curves whose shape is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_atlas.criteria import create
from sparsity_atlas.evaluation.next_level import Point, Range, Stop, next_level
from sparsity_atlas.spelling import canonical_level

TOPP = Range(1.0, 0.0, ("0.98", "0.9", "0.75", "0.5"))
TOPK = Range(1.0, 0.0, ("0.8", "0.6", "0.4", "0.2"))
MAXP = Range(0.0, 1.0, ("0.01", "0.04", "0.1", "0.25"))

Response = Callable[[float], tuple[float, ...]]  # level -> sparsity, damage, slightest damage


def run(
    response: Response,
    levels: Range,
    dense_sparsity: float = 0.0,
    max_levels: int = 9,
    resolution: float = 0.01,
    further: Sequence[tuple[float, int]] = (),
) -> tuple[list[Point], str]:
    points: list[Point] = []
    # More calls than any search may need: one that does not end fails here.
    for _ in range(200):
        level = next_level(points, dense_sparsity, levels, max_levels, resolution, further)
        if isinstance(level, Stop):
            return points, level.reason
        assert level == canonical_level(level)
        assert level not in {point.level for point in points}
        low, high = sorted((levels.dense, levels.harshest))
        assert low <= float(level) <= high
        assert float(level) != levels.dense
        points.append(Point(level, *response(float(level))))
    raise AssertionError("the search does not end")


def bracket(points: list[Point], dense_sparsity: float) -> float:
    """Width, in sparsity, between the mildest level below the bar and the level before it."""
    known = sorted([Point("dense", dense_sparsity, 0.0), *points], key=lambda one: one.sparsity)
    below = next(i for i, one in enumerate(known) if one.damage > 1)
    return known[below].sparsity - known[below - 1].sparsity


def curve(levels: Range, shape: float, crossing: float, steep: float, dense: float) -> Response:
    """Sparsity a power of the distance from dense; damage a power that is 1 at `crossing`."""
    length = abs(levels.harshest - levels.dense)

    def response(level: float) -> tuple[float, float]:
        sparsity = dense + (1 - dense) * (abs(level - levels.dense) / length) ** shape
        place = dense + (1 - dense) * crossing
        return sparsity, ((sparsity - dense) / (place - dense)) ** steep

    return response


FAMILY = st.tuples(
    st.sampled_from([(TOPP, 0.35, 0.7), (TOPK, 0.8, 1.3), (MAXP, 0.4, 0.6)]),
    st.floats(0, 1),
    st.floats(0.05, 0.9),
    st.floats(1.2, 8),
    st.sampled_from((0.0, 0.0, 0.4, 0.8)),
)
COUNTS: list[int] = []


@settings(max_examples=150, deadline=None, derandomize=True)
@given(FAMILY)
def test_smooth_curves_are_bracketed_within_nine_levels(family: tuple) -> None:
    (levels, low, high), mix, crossing, steep, dense = family
    response = curve(levels, low + mix * (high - low), crossing, steep, dense)
    points, reason = run(response, levels, dense)
    COUNTS.append(len(points))
    assert reason.startswith("bracketed"), [(one.level, one.sparsity) for one in points]
    assert bracket(points, dense) <= (0.01 if len(points) < 6 else 0.03)


def test_smooth_curves_take_five_levels_on_average() -> None:
    if not COUNTS:  # run alone
        test_smooth_curves_are_bracketed_within_nine_levels()
    assert sum(COUNTS) / len(COUNTS) < 5.5
    assert sum(count > 6 for count in COUNTS) < 0.15 * len(COUNTS)


def test_six_levels_are_enough_and_one_lies_before_the_crossing() -> None:
    draw, wide, late = random.Random(1), 0, 0
    for _ in range(200):
        levels, low, high = draw.choice([(TOPP, 0.35, 0.7), (TOPK, 0.8, 1.3), (MAXP, 0.4, 0.6)])
        crossing, dense = draw.uniform(0.05, 0.8), draw.choice([0.0, 0.0, 0.4, 0.8])
        response = curve(levels, draw.uniform(low, high), crossing, draw.uniform(1.5, 8), dense)
        points, _ = run(response, levels, dense, max_levels=6)
        wide += bracket(points, dense) > 0.01
        # Replicates of a bootstrap that cross before the first level have no crossing.
        late += min(one.sparsity for one in points) - dense > 0.9 * crossing * (1 - dense)
    assert wide <= 12
    assert late <= 4


def test_levels_lie_where_the_interval_of_a_crossing_ends() -> None:
    """Where samples know little, the ends on straight lines are the curve's own."""
    draw, wrong, before = random.Random(2), [], []
    for _ in range(60):
        levels, low, high = draw.choice([(TOPP, 0.35, 0.7), (TOPK, 0.8, 1.3), (MAXP, 0.4, 0.6)])
        crossing, steep, share = draw.uniform(0.2, 0.6), draw.uniform(2, 5), draw.uniform(0.1, 0.3)
        smooth = curve(levels, draw.uniform(low, high), crossing, steep, 0.0)

        def response(
            level: float, smooth: Response = smooth, share: float = share
        ) -> tuple[float, ...]:
            sparsity, damage = smooth(level)
            return sparsity, damage, math.inf, share * damage

        for asked, found in ((response, wrong), (smooth, before)):
            points, _ = run(asked, levels, max_levels=6)
            assert len(points) <= 6
            order = sorted(points, key=lambda one: one.sparsity)
            xs = [0.0, *(one.sparsity for one in order)]
            # Where damage with and without two standard errors reaches the bar.
            for factor in (1 + 2 * share, 1 - 2 * share):
                ys = [0.0, *(factor * one.damage for one in order)]
                end = crossing * factor ** (-1 / steep)
                found.append(abs(float(np.interp(1, ys, xs)) - end))
    assert 2 * np.mean(wrong) < np.mean(before)
    assert np.quantile(wrong, 0.9) < 0.012 < 0.018 < np.quantile(before, 0.9)


def test_where_the_interval_is_narrow_no_level_is_spent_on_its_ends() -> None:
    smooth = curve(TOPP, 0.5, 0.43, 3.5, 0.0)

    def response(level: float) -> tuple[float, float, float, float]:
        sparsity, damage = smooth(level)
        return sparsity, damage, math.inf, 0.02 * damage

    assert [one.level for one in run(response, TOPP)[0]] == [
        one.level for one in run(smooth, TOPP)[0]
    ]


@pytest.mark.parametrize("levels", [TOPP, TOPK, MAXP])
def test_nothing_is_spent_on_coarse_levels_where_others_bracket_the_bar(levels: Range) -> None:
    points, reason = run(curve(levels, 0.5, 0.1, 4, 0.0), levels)
    assert reason.startswith("bracketed")
    assert len(points) <= 6
    assert [one.level for one in points if one.level in levels.coarse] == [levels.coarse[1]]


def test_what_is_left_of_six_levels_goes_beyond_for_scores_that_hold_out() -> None:
    smooth = curve(TOPP, 0.4, 0.22, 4, 0.0)

    def response(level: float) -> tuple[float, float, float]:
        sparsity, damage = smooth(level)
        return sparsity, damage, damage / 20  # an accuracy, beside a loss

    alone, _ = run(smooth, TOPP)
    points, reason = run(response, TOPP)
    assert [one.level for one in points[: len(alone)]] == [one.level for one in alone]
    assert [one.level for one in points[len(alone) :]] == ["0.75", "0.5"][: 6 - len(alone)] != []
    assert reason.startswith("bracketed")


@settings(max_examples=150, deadline=None)
@given(FAMILY, st.integers(0, 10**6), st.floats(0, 3), st.integers(2, 24), st.floats(1e-4, 0.3))
def test_noisy_curves_end(
    family: tuple, seed: int, noise: float, max_levels: int, resolution: float
) -> None:
    (levels, low, _), _, crossing, steep, dense = family
    smooth = curve(levels, low, crossing, steep, dense)
    draw = random.Random(seed)

    def response(level: float) -> tuple[float, float]:
        sparsity, damage = smooth(level)
        # Levels of unlike tasks need not be in the order of their sparsity.
        jitter = min(max(sparsity + draw.gauss(0, 0.02 * noise), 0), 1)
        if draw.random() < 0.1:
            return math.nan, math.inf
        return jitter, damage + draw.gauss(0, noise)

    points, _ = run(response, levels, dense, max_levels, resolution)
    assert len(points) <= max_levels


@pytest.mark.parametrize("levels", [TOPP, TOPK, MAXP])
def test_never_below_the_bar(levels: Range) -> None:
    # Beyond the coarse levels it must go on towards the harsh end, where full sparsity is.
    points, reason = run(lambda level: (abs(level - levels.dense), 0.0), levels)
    assert max(one.sparsity for one in points) > 0.9
    assert reason in ("9 levels evaluated", "above the bar at full sparsity")


@pytest.mark.parametrize("levels", [TOPP, TOPK, MAXP])
def test_below_the_bar_at_every_coarse_level(levels: Range) -> None:
    response = curve(levels, 0.5, 0.01, 1.5, 0.0)
    points, reason = run(response, levels)
    assert reason.startswith("bracketed")
    assert bracket(points, 0.0) <= 0.01
    assert len(points) <= 6


def test_a_step_is_found_by_halving() -> None:
    points, _ = run(lambda level: (1 - level, 0.0 if level > 0.613 else 1e6), TOPP, max_levels=16)
    assert bracket(points, 0.0) <= 0.03


@pytest.mark.parametrize("failing", [0.95, 0.8, 0.3])
def test_failed_levels_count_as_below_the_bar(failing: float) -> None:
    def response(level: float) -> tuple[float, float]:
        return (math.nan, math.inf) if level < failing else (1 - level, 0.5)

    points, _ = run(response, TOPP, max_levels=20)
    finite = max(float(one.level) for one in points if math.isinf(one.damage))
    sound = min(float(one.level) for one in points if not math.isinf(one.damage))
    assert finite < failing <= sound
    # Failure has no sparsity, so it is the levels that are brought together.
    assert sound - finite < 0.05


def test_every_level_fails() -> None:
    points, _ = run(lambda _: (math.nan, math.inf), TOPP)
    assert len(points) == 9


def test_relu_has_most_of_its_sparsity_at_the_dense_level() -> None:
    response = curve(TOPP, 0.6, 0.4, 3, 0.85)
    points, reason = run(response, TOPP, dense_sparsity=0.85)
    assert reason.startswith("bracketed")
    assert bracket(points, 0.85) <= 0.01


def test_damage_below_zero_is_above_the_bar() -> None:
    # A little sparsity may improve a small sample's score.
    points, reason = run(lambda level: (1 - level, -0.5 if level > 0.6 else 4.0), TOPP)
    assert points
    assert reason


def test_points_in_any_order_give_the_same_level() -> None:
    response = curve(TOPP, 0.5, 0.4, 2, 0.0)
    points = [Point(level, *response(float(level))) for level in (*TOPP.coarse, "0.93")]
    wanted = next_level(points, 0.0, TOPP, 9, 0.01)
    for seed in range(5):
        shuffled = random.Random(seed).sample(points, len(points))
        assert next_level(shuffled, 0.0, TOPP, 9, 0.01) == wanted


def test_levels_are_short() -> None:
    points, _ = run(curve(TOPP, 0.5, 0.4, 2, 0.0), TOPP)
    assert all(-Decimal(one.level).as_tuple().exponent <= 5 for one in points)


@pytest.mark.parametrize("rule", ["topp", "topk", "maxp"])
def test_ranges_above_are_the_criteria_s_own(rule: str) -> None:
    criterion = create({"rule": rule})
    known = {"topp": TOPP, "topk": TOPK, "maxp": MAXP}[rule]
    assert (criterion.dense_level, criterion.coarse_levels) == (known.dense, known.coarse)


def test_every_further_bar_is_bracketed_where_bisection_finds_it() -> None:
    draw, counts, widths = random.Random(3), [], []
    wanted = [1.0, *(math.log1p(p / 100) / math.log(1.01) for p in (5, 10))]
    for _ in range(150):
        levels, low, high = draw.choice([(TOPP, 0.35, 0.7), (TOPK, 0.8, 1.3), (MAXP, 0.4, 0.6)])
        crossing, dense = draw.uniform(0.05, 0.6), draw.choice([0.0, 0.0, 0.4, 0.8])
        response = curve(levels, draw.uniform(low, high), crossing, draw.uniform(1.5, 8), dense)
        further = [(wanted[1], 6 + 3), (wanted[2], 6 + 6)]
        points, _ = run(response, levels, dense, max_levels=6, further=further)
        counts.append(len(points))
        for allowed in wanted:
            # The plain way: halve between dense and the harshest level until they are one.
            mild, harsh = levels.dense, levels.harshest
            for _ in range(60):
                middle = (mild + harsh) / 2
                mild, harsh = (middle, harsh) if response(middle)[1] <= allowed else (mild, middle)
            place = response(mild)[0]
            known = [dense, *(one.sparsity for one in points), 1.0]
            after = min((one for one in known if one > place), default=1.0)
            widths.append(after - max(one for one in known if one <= place))
    assert max(widths) <= 0.03
    assert sum(width > 0.0101 for width in widths) <= 0.02 * len(widths)
    assert sum(counts) / len(counts) < 9.5


def test_a_further_bar_has_a_level_beyond_it_and_its_own_reason() -> None:
    points, _ = run(curve(TOPP, 0.4, 0.22, 4, 0.0), TOPP, further=[(9.6, 12)])
    assert max(one.damage for one in points) >= 1.5 * 9.6
    stopped = next_level(points, 0.0, TOPP, 9, 0.01, [(9.6, 12)])
    assert isinstance(stopped, Stop)
    assert [one.startswith("bracketed") for one in (stopped.reason, *stopped.further)] == [True] * 2


def test_further_bars_change_no_level_of_the_headline() -> None:
    response = curve(MAXP, 0.5, 0.3, 3, 0.4)
    alone, _ = run(response, MAXP, 0.4)
    points, _ = run(response, MAXP, 0.4, further=[(4.9, 12)])
    assert points[: len(alone)] == alone
    assert len(points) > len(alone)
