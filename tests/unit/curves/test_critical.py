"""Critical sparsity on curves with known answers, and what must not change it."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_atlas.curves.critical import (
    BARS,
    CriticalRow,
    critical,
    crossing_levels,
    crossings,
)
from sparsity_atlas.curves.points import CurvePoint, anchored_scores, curve_points, estimate_all
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.statistics import bootstrap
from sparsity_atlas.statistics.bootstrap import (
    FEWEST_UNITS,
    TaskSamples,
    average,
    estimate,
    in_percent,
    interval,
    percentile_interval,
)

ITEMS = 4000
ENTRIES = 1000
DENSE = 0.5


def accuracy_task(
    sparsity: list[float], retained: list[float], *, name: str = "t", items: int = ITEMS, **other
) -> TaskSamples:
    """Exact retained accuracies: the first items are right, as many as asked for."""
    rank = np.arange(items)
    right = np.round(np.array(retained) * DENSE * items)
    counts = np.round(np.array(sparsity) * ENTRIES).astype(np.int64)
    return TaskSamples(
        task=name,
        kind="accuracy",
        value=(rank < right[:, None]).astype(float),
        weight=np.ones(items),
        dense=(rank < DENSE * items).astype(float),
        zeros=np.repeat(counts[:, None], items, axis=1),
        entries=np.full((len(sparsity), items), ENTRIES),
        **other,
    )


def loss_task(sparsity: list[float], added: list[float], **other) -> TaskSamples:
    """Exact added losses, in nats per token, on samples of unequal length."""
    tokens = np.arange(1, 101)
    counts = np.round(np.array(sparsity) * ENTRIES).astype(np.int64)
    dense = 4.0 * tokens + np.sin(tokens)
    return TaskSamples(
        task="text",
        kind="loss",
        value=dense + np.array(added)[:, None] * tokens,
        weight=tokens,
        dense=dense,
        zeros=counts[:, None] * tokens,
        entries=np.full((len(sparsity), 1), ENTRIES) * tokens,
        **other,
    )


def rows_of(
    tasks: list[TaskSamples], bars=BARS, replicates: int = 1000, seed: int = 0
) -> list[CriticalRow]:
    return critical(estimate_all(tasks, replicates, seed), bars)


def points_of(tasks: list[TaskSamples], levels, replicates: int = 1000) -> list[CurvePoint]:
    return curve_points(estimate_all(tasks, replicates, 0), levels)


def headline(task: TaskSamples, bar: float = 0.99, **options) -> CriticalRow:
    """The row of the task itself."""
    return rows_of([task], [bar], **({"replicates": 200} | options))[0]


def test_linear_curve_is_crossed_exactly():
    levels = [0.2, 0.4, 0.6, 0.8]
    task = accuracy_task(levels, [1 - 0.1 * s for s in levels])
    expected = {0.995: None, 0.99: None, 0.98: 0.2, 0.95: 0.5}
    rows = {row.bar: row for row in rows_of([task], replicates=200) if row.task == "t"}
    assert list(rows) == list(BARS)
    for bar, value in expected.items():
        if value is None:
            assert (rows[bar].relation, rows[bar].value) == ("<", 0.2)
        else:
            assert rows[bar].relation == "="
            assert rows[bar].value == pytest.approx(value)
    assert rows[0.95].paper_value == 0.4
    assert rows[0.95].first_crossing == pytest.approx(0.5)
    assert rows[0.995].first_crossing == pytest.approx(0.05)
    assert rows[0.995].paper_value == 0.0
    assert not rows[0.95].non_monotone


def test_a_bar_met_exactly_is_met():
    row = headline(accuracy_task([0.3, 0.7], [0.99, 0.5]))
    assert row.paper_value == 0.3
    assert row.value == pytest.approx(0.3)
    assert row.relation == "="


def test_the_level_of_a_crossing_lies_between_those_around_it():
    # Falls from 1 to 0.98 between 0.2 and 0.6: crosses 0.99 half-way, at 0.4.
    task = accuracy_task([0.6, 0.2, 0.8], [0.98, 1.0, 0.5])
    rows = critical(estimate_all([task], 200, 0), [0.99], ["0.5", "0.1", "0.9"])
    assert rows[0].value == pytest.approx(0.4)
    assert rows[0].crossing_level == pytest.approx(0.3)
    assert rows[0].crossing_level_low < 0.3 < rows[0].crossing_level_high


@pytest.mark.parametrize("falls", [False, True])
def test_levels_at_crossings_by_a_loop(falls: bool) -> None:
    """Each replicate's crossing on its own curve, and the level on a straight line between neighbours."""
    rng = np.random.default_rng(2)
    levels = ["0.7", "0.1", "0.4", "0.2"] if falls else ["0.3", "0.9", "0.6", "0.8"]
    base = np.array([0.3, 0.9, 0.6, 0.8])
    tokens = rng.integers(20, 60, 40)
    added = 0.018 * base[:, None] ** 2 + rng.normal(0, 0.004, (4, 40))
    dense = 4.0 * tokens
    task = TaskSamples(
        **{"task": "text", "kind": "loss", "value": dense + added * tokens, "weight": tokens},
        **{"dense": dense, "zeros": rng.binomial(1000, base[:, None], (4, 40))},
        entries=np.full((4, 40), 1000),
    )
    (estimates,) = estimate_all([task], 50, 0)
    scores = anchored_scores(estimates)
    crossing = crossings(estimates, scores, 0.99)
    found = crossing_levels(scores, crossing, levels)
    for row, place in enumerate(crossing):
        pairs = sorted(zip(estimates.sparsity[row], map(float, levels), strict=True))
        xs, ys = zip(*pairs, strict=True)
        assert found[row] == pytest.approx(np.interp(place, xs, ys))
    assert np.isfinite(crossing).sum() > 20
    low, high = percentile_interval(found[1:])
    (row,) = critical([estimates], [0.99], levels)
    assert row.crossing_level == pytest.approx(found[0])
    assert row.crossing_level_low <= min(low, found[0])
    assert row.crossing_level_high >= max(high, found[0])


def test_the_level_beyond_what_was_measured_is_the_last_one():
    task = accuracy_task([0.2, 0.6], [1.0, 1.0])
    (row, _) = critical(estimate_all([task], 200, 0), [0.99], ["0.9", "0.5"])
    assert (row.relation, row.crossing_level) == (">=", 0.5)
    assert rows_of([task], [0.99])[0].crossing_level is None


def test_curve_that_returns_to_the_bar():
    # Fit: 0.98 and 1.0 pool to 0.99, so the crossing lies after them and not before.
    row = headline(accuracy_task([0.2, 0.4, 0.6, 0.8], [1.0, 0.98, 1.0, 0.97]))
    assert row.non_monotone
    assert row.first_crossing == pytest.approx(0.3)
    assert row.value == pytest.approx(0.6)
    assert row.paper_value == 0.6


def test_levels_better_than_dense_lift_a_dip_but_not_the_start():
    scores = anchored_scores(
        estimate(accuracy_task([0.2, 0.4, 0.6], [1.04, 0.98, 1.01]), replicates=0)
    )
    np.testing.assert_allclose(scores.fit[0], [1, 1, 0.995, 0.995])
    assert headline(accuracy_task([0.2, 0.4, 0.6], [0.985, 1.01, 0.97])).value > 0.4


def test_curve_never_below_the_bar():
    row = headline(accuracy_task([0.2, 0.9], [1.0, 0.995]))
    assert (row.relation, row.value) == (">=", 0.9)
    assert (row.interval_high, row.high_open, row.low_open) == (0.9, True, False)
    assert (row.first_crossing, row.paper_value, row.non_monotone) == (None, 0.9, False)


def test_curve_below_the_bar_at_its_first_level():
    row = headline(accuracy_task([0.3, 0.6], [0.9, 0.5]))
    assert (row.relation, row.value) == ("<", 0.3)
    assert (row.interval_low, row.low_open, row.high_open) == (0.3, True, False)
    assert row.first_crossing == pytest.approx(0.03)
    assert row.paper_value == 0.0


def test_interval_open_above_although_the_value_is_a_crossing():
    row = headline(accuracy_task([0.5, 0.9], [1.0, 0.985], items=300))
    assert row.relation == "="
    assert (row.interval_high, row.high_open) == (0.9, True)
    assert row.interval_low < row.value < 0.9


def test_failed_level_is_below_every_bar():
    task = accuracy_task([0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 1.0, 1.0])
    task.value[2, 5] = np.nan
    for bar in BARS:
        row = headline(task, bar)
        assert row.value == row.paper_value - 0.4 == row.first_crossing == pytest.approx(0.4)
        assert row.relation == "="
        assert row.non_monotone


def test_infinite_loss_is_a_failed_level():
    task = loss_task([0.2, 0.4], [0.0, 0.0])
    task.value[1, 3] = np.inf
    assert headline(task).value == pytest.approx(0.2)


def test_failed_level_of_unknown_sparsity_is_left_out():
    task = accuracy_task([0.2, 0.4, 0.0], [1.0, 0.98, 1.0])
    task.value[2], task.entries[2] = np.nan, 0
    same = headline(accuracy_task([0.2, 0.4], [1.0, 0.98]))
    assert headline(task) == same
    alone = accuracy_task([0.0], [1.0])
    alone.value[0], alone.entries[0] = np.nan, 0
    assert headline(alone).relation == "none"


def test_level_that_failed_on_one_task_failed_on_average():
    good = accuracy_task([0.2, 0.4], [1.0, 1.0], name="good")
    bad = accuracy_task([0.2, 0.4], [1.0, 1.0], name="bad")
    bad.value[1, 0] = np.nan
    rows = {row.task: row for row in rows_of([good, bad], [0.99], replicates=50)}
    assert rows["good"].relation == ">="
    assert (rows["average"].relation, rows["average"].value) == ("=", pytest.approx(0.2))


def test_failed_dense_has_no_value():
    task = accuracy_task([0.2, 0.4], [1.0, 1.0])
    task.dense[0] = np.nan
    for row in rows_of([task], replicates=50):
        assert (row.relation, row.value, row.dense_value) == ("none", None, None)


@pytest.mark.parametrize(
    ("chance", "items", "has_value"),
    [(0.25, 400, True), (0.46, 400, False), (0.46, 8000, True), (0.6, 8000, False)],
)
def test_dense_accuracy_at_chance_by_its_interval(chance, items, has_value):
    # The interval of a dense accuracy of 0.5 reaches 0.05 down at 400 items, 0.011 at 8,000.
    row = headline(accuracy_task([0.3, 0.6], [1.0, 0.5], items=items, chance=chance))
    assert (row.relation != "none") == has_value
    assert (row.value is not None) == has_value
    assert row.chance == chance


def test_dense_model_that_gets_nothing_right_has_no_value():
    task = replace(accuracy_task([0.3], [1.0]), dense=np.zeros(ITEMS))
    assert headline(task).relation == "none"
    assert [point.retained for point in points_of([task], ["a"], 50)] == [None] * 4


def test_equal_sparsities_are_pooled():
    row = headline(accuracy_task([0.2, 0.6, 0.6], [1.0, 1.0, 0.96]))
    # The mean at 0.6 is 0.98, half way below the bar from 1 at 0.2.
    assert row.value == pytest.approx(0.4)
    assert not row.non_monotone


def test_single_level():
    assert headline(accuracy_task([0.4], [0.98])).relation == "<"
    assert headline(accuracy_task([0.4], [1.0])).relation == ">="


def test_the_curve_starts_at_the_natural_sparsity_of_dense():
    natural = {
        "dense_zeros": np.full(ITEMS, 700),
        "dense_entries": np.full(ITEMS, ENTRIES),
    }
    task = accuracy_task([0.8, 0.9], [0.98, 0.9], **natural)
    assert headline(task).first_crossing == pytest.approx(0.75)
    assert headline(task, 0.98).paper_value == 0.8
    short = headline(accuracy_task([0.699, 0.9], [1.0, 0.9], **natural))
    assert (short.paper_value, short.value) == (0.7, pytest.approx(0.72))
    assert points_of([task], ["a", "b"], 50)[0].sparsity == pytest.approx(0.7)


def test_loss_crosses_at_the_log_of_the_perplexity_ratio():
    task = loss_task([0.2, 0.4, 0.8], [-0.001, 0.0, np.log(1.02)])
    rows = {row.bar_label: row for row in rows_of([task], replicates=100)}
    assert list(rows) == ["PPL-0.5%", "PPL-1%", "PPL-2%", "PPL-5%"]
    for percent in (0.5, 1, 2):
        share = np.log1p(percent / 100) / np.log(1.02)
        assert rows[f"PPL-{percent:g}%"].value == pytest.approx(0.4 + 0.4 * share)
    assert rows["PPL-1%"].paper_value == 0.4
    assert (rows["PPL-5%"].relation, rows["PPL-5%"].value) == (">=", 0.8)
    assert rows["PPL-1%"].dense_value == pytest.approx(4 + np.sin(np.arange(101)).sum() / 5050)
    assert all(row.resolved for row in rows.values())


def test_the_average_is_normalised_after_averaging_and_leaves_loss_out():
    # Dense 0.5 and 0.25; level 0.4 and 0.3: retained (0.4 + 0.3) / (0.5 + 0.25) = 0.9333.
    one = accuracy_task([0.3], [0.8], name="one")
    two = accuracy_task([0.5], [0.6], name="two", items=1000)
    two = replace(two, dense=(np.arange(1000) < 250).astype(float))
    rows = rows_of([one, loss_task([0.9], [9.0]), two], [0.9], replicates=50)
    assert [row.task for row in rows] == ["one", "text", "two", "average"]
    mean = rows[-1]
    assert (mean.value, mean.relation, mean.items) == (pytest.approx(0.4), ">=", 5000)
    assert mean.dense_value == pytest.approx(0.375)
    point = points_of([one, two], ["a"], 50)[-1]
    assert (point.task, point.level) == ("average", "a")
    assert point.retained == pytest.approx(0.7 / 0.75)
    assert [row.task for row in rows_of([loss_task([0.9], [9.0])], [0.9], 50)] == ["text"]


def test_chance_of_the_average():
    tasks = [accuracy_task([0.5], [1.0], name=name) for name in "ab"]
    known, unknown = replace(tasks[0], chance=0.4), tasks[1]
    assert average([estimate(known, 0), estimate(unknown, 0)]).chance == pytest.approx(0.2)
    assert average([estimate(unknown, 0)]).chance is None


@pytest.mark.parametrize(
    ("items", "bar", "resolved"),
    [
        *((598, 0.99, False), (600, 0.99, True), (1198, 0.995, False), (1200, 0.995, True)),
        *((298, 0.98, False), (300, 0.98, True), (118, 0.95, False), (120, 0.95, True)),
    ],
)
def test_a_bar_is_resolved_from_three_lost_items_on(items: int, bar: float, resolved: bool) -> None:
    """Of half the items that dense gets right, a bar of 0.99 allows to lose 3 of 600."""
    assert headline(accuracy_task([0.5], [1.0], items=items), bar).resolved == resolved


@pytest.mark.parametrize("bar", BARS)
def test_eight_items_and_three_documents_resolve_nothing(bar: float) -> None:
    assert not headline(accuracy_task([0.2, 0.5], [1.0, 0.5], items=8), bar).resolved
    text = loss_task([0.2, 0.4, 0.8], [0.0, 0.001, 0.2])
    names = ("value", "zeros", "entries")
    three = replace(
        text,
        **{name: getattr(text, name)[:, :3] for name in names},
        **{name: getattr(text, name)[:3] for name in ("weight", "dense")},
    )
    row = headline(three, bar)
    assert (row.resolved, row.items, row.units, row.interval_low) == (False, 3, 3, None)
    assert headline(text, bar).resolved


@pytest.mark.parametrize(
    ("drop", "relation", "resolved"),
    [
        ([0.0, 0.001, 0.003], ">=", True),  # the end is above the bar, and all replicates say so
        ([0.0, 0.008, 0.0095], ">=", False),  # so is this one, but not all of them say so
        ([0.02, 0.05, 0.3], "<", True),
        ([0.011, 0.03, 0.3], "<", False),
        ([0.0, 0.008, 0.012], "=", False),  # where the crossing ends is not known
        ([0.0, 0.005, 0.05], "=", True),
    ],
)
def test_what_the_interval_must_say(drop: list[float], relation: str, resolved: bool) -> None:
    row = headline(accuracy_task([0.2, 0.3, 0.4], [1 - one for one in drop], items=3000))
    assert (row.relation, row.resolved) == (relation, resolved)


@pytest.mark.parametrize("relation", [">=", "<"])
def test_a_single_level_is_resolved_only_if_no_replicate_lies_on_its_other_side(
    relation: str,
) -> None:
    """Both ends of its interval stand at its own sparsity."""
    # Items that change, as many to the better as to the worse but for a few.
    task = accuracy_task([0.5], [1.0])
    value = task.value.copy()
    value[:, :300], value[:, -285 if relation == ">=" else -270 :] = 0.0, 1.0
    row = headline(replace(task, value=value), 0.99)
    assert (row.relation, row.low_open, row.high_open) == (relation, True, True)
    assert row.interval_low == row.interval_high == row.value
    assert not row.resolved


def test_a_wide_interval_resolves_nothing() -> None:
    near, far = (
        headline(accuracy_task([0.1, end], [1.0, 0.97], items=1200)) for end in (0.3, 0.95)
    )
    assert (near.resolved, far.resolved) == (True, False)
    assert not far.low_open
    assert not far.high_open
    assert far.interval_high - far.interval_low > 0.25


def test_few_units_have_no_interval_though_items_abound() -> None:
    for clusters in (FEWEST_UNITS - 1, FEWEST_UNITS, 20):
        task = accuracy_task([0.2, 0.4], [1.0, 0.9], cluster=np.arange(ITEMS) % clusters)
        row = headline(task, 0.95)
        assert row.units == clusters
        assert (row.interval_low is None) == (clusters < FEWEST_UNITS)
        assert row.resolved == (clusters >= 20)
    small = replace(task, cluster=np.arange(ITEMS) % 3, task="small")
    average_row = rows_of([task, small], [0.95], 50)[-1]
    assert (average_row.task, average_row.units, average_row.interval_low) == ("average", 3, None)


def test_digits_of_an_interval_are_those_that_replicates_support() -> None:
    rng = np.random.default_rng(0)
    for count in (1000, 10_000, 100_000):
        low, high = interval(0.5, rng.normal(0.5, 0.02, count))
        digits = {1000: 3, 10_000: 3, 100_000: 4}[count]
        assert low == round(low, digits)
        assert high == round(high, digits)
        assert low <= 0.5 - 1.9 * 0.02
        assert high >= 0.5 + 1.9 * 0.02
    # Small numbers keep as many digits as large ones; what does not vary keeps all.
    low, _ = interval(5e-5, rng.normal(5e-5, 2e-6, 10_000))
    assert 4.5e-5 < low == round(low, 8) < 4.61e-5
    assert interval(0.123456789, np.full(200, 0.123456789)) == (0.123456789, 0.123456789)
    assert np.isnan(interval(0.5, np.array([0.4, np.nan]))).all()


@pytest.mark.parametrize(
    ("low", "high", "places", "shown"),
    [
        (0.4446, 0.5041, 1, ("44.4", "50.5")),
        (0.4446, 0.5041, 0, ("44", "51")),
        (0.47, 0.47, 1, ("47", "47")),
        (0.29, 0.57, 0, ("29", "57")),
        (-0.00012, 1, 1, ("-0.1", "100")),
    ],
)
def test_ends_are_shown_rounded_outwards(
    low: float, high: float, places: int, shown: tuple[str, str]
) -> None:
    assert in_percent(low, high, places) == shown
    opened = in_percent(low, high, places, opened=(True, True))
    assert opened == (f"<{shown[0]}", f">{shown[1]}")


@given(st.integers(0, 2**32 - 1), st.integers(1, 500), st.floats(-3, 3))
def test_a_rounded_interval_holds_the_value_and_the_percentiles(seed, count, scale):
    replicates = np.random.default_rng(seed).normal(0.3, 10**scale, count).round(4)
    value = float(replicates[0])
    low, high = interval(value, replicates)
    exact = percentile_interval(replicates)
    assert low <= min(value, exact[0])
    assert high >= max(value, exact[1])


def test_another_seed_moves_an_end_by_about_a_digit() -> None:
    task = random_task(5)
    rows = [headline(task, 0.95, seed=seed, replicates=10_000) for seed in range(5)]
    for name in ("interval_low", "interval_high"):
        ends = [getattr(row, name) for row in rows]
        assert max(ends) - min(ends) <= 0.02 + 1e-9
        assert all(end == round(end, 3) for end in ends)


def random_task(seed: int) -> TaskSamples:
    """400 items at six levels; an item right at one level is mostly right at the next."""
    rng = np.random.default_rng(seed)
    bound = np.array([0.75, 0.74, 0.75, 0.72, 0.7, 0.6])
    margin = rng.random(400) + rng.normal(0, 0.05, (7, 400)).cumsum(axis=0)
    entries = 1000 * rng.integers(10, 90, 400)
    share = np.linspace(0.1, 0.9, 6)[:, None] + rng.normal(0, 0.01, 400)
    return TaskSamples(
        task="t",
        kind="accuracy",
        value=(margin[1:] < bound[:, None]).astype(float),
        weight=np.ones(400),
        dense=(margin[0] < 0.75).astype(float),
        zeros=(share * entries).astype(np.int64),
        entries=np.broadcast_to(entries, share.shape),
    )


def same_rows(left: list[CriticalRow], right: list[CriticalRow]) -> None:
    for one, other in zip(left, right, strict=True):
        assert asdict(one) == pytest.approx(asdict(other), nan_ok=True)


@given(st.permutations(range(6)))
def test_order_of_levels(order):
    task = random_task(1)
    arrays = {name: getattr(task, name)[list(order)] for name in ("value", "zeros", "entries")}
    same_rows(rows_of([task], replicates=50), rows_of([replace(task, **arrays)], replicates=50))


def test_order_of_samples():
    task = replace(random_task(2), cluster=np.arange(400) // 5)
    order = np.random.default_rng(0).permutation(400)
    levels = {name: getattr(task, name)[:, order] for name in ("value", "zeros", "entries")}
    single = {name: getattr(task, name)[order] for name in ("weight", "dense", "cluster")}
    moved = replace(task, **levels, **single)
    same_rows(rows_of([task], replicates=50), rows_of([moved], replicates=50))


def test_clusters_of_one_item_are_plain_samples():
    task = random_task(3)
    clustered = replace(task, cluster=np.arange(400) + 17)
    same_rows(rows_of([task], replicates=100), rows_of([clustered], replicates=100))


def test_a_sample_of_weight_two_counts_as_two():
    task = random_task(4)
    heavy = np.arange(400) % 3 == 0
    times = np.where(heavy, 2, 1)
    levels = ("value", "zeros", "entries")
    arrays = {name: np.repeat(getattr(task, name), times, axis=1) for name in levels}
    repeated = TaskSamples(
        task="t",
        kind="accuracy",
        weight=np.ones(times.sum()),
        dense=np.repeat(task.dense, times),
        cluster=np.repeat(np.arange(400), times),
        **arrays,
    )
    weighted = replace(
        task,
        weight=times.astype(float),
        zeros=task.zeros * times,
        entries=task.entries * times,
    )
    left, right = (rows_of([one], replicates=100) for one in (weighted, repeated))
    same_rows(left, [replace(row, items=400) for row in right])


def test_same_seed_same_rows_other_seed_other_interval():
    task = random_task(5)
    assert rows_of([task], seed=3) == rows_of([task], seed=3)
    assert headline(task, 0.95, seed=3) != headline(task, 0.95, seed=4)
    assert headline(task, 0.95, seed=3).value == headline(task, 0.95, seed=4).value


def test_a_task_keeps_its_interval_beside_others():
    task, other = random_task(6), replace(random_task(7), task="other")
    assert rows_of([other, task], [0.95])[1] == rows_of([task], [0.95])[0]


def test_tasks_are_resampled_independently():
    one, two = random_task(7), replace(random_task(7), task="other")
    estimates = [estimate(task, replicates=500) for task in (one, two)]
    assert estimates[0].value[1:].tolist() != estimates[1].value[1:].tolist()
    single = estimates[0].dense_value[1:].var()
    assert average(estimates).dense_value[1:].var() == pytest.approx(single / 2, rel=0.3)


@pytest.mark.parametrize("replicates", [1, 2, 5])
def test_interval_holds_the_value(replicates):
    # Few replicates lie to one side of the value more often than not.
    for seed in range(20):
        row = headline(random_task(10), 0.95, replicates=replicates, seed=seed)
        assert row.interval_low <= row.value <= row.interval_high


def test_blocks_of_replicates_change_nothing(monkeypatch):
    task = random_task(8)
    whole = estimate(task, replicates=50)
    monkeypatch.setattr(bootstrap, "_BLOCK", 7 * 400)
    assert np.array_equal(estimate(task, replicates=50).value, whole.value)


def test_levels_are_resampled_together_with_dense():
    task = random_task(9)
    same = replace(task, value=np.repeat(task.dense[None], 6, axis=0))
    points = points_of([same], list("abcdef"), replicates=100)
    for point in points:
        assert (point.retained, point.retained_low, point.retained_high) == (1, 1, 1)
        assert point.value_low < point.value < point.value_high


def test_few_clusters_have_the_unbiased_variance(monkeypatch):
    monkeypatch.setattr(bootstrap, "FEWEST_UNITS", 2)
    rng = np.random.default_rng(0)
    means = rng.normal(4.0, 1.0, 5)
    task = TaskSamples(
        task="t",
        kind="loss",
        value=np.repeat(means, 3)[None],
        weight=np.ones(15),
        dense=np.ones(15),
        zeros=np.zeros((1, 15), np.int64),
        entries=np.ones((1, 15), np.int64),
        cluster=np.repeat(np.arange(5), 3),
    )
    value = estimate(task, replicates=20_000).value
    assert value[0, 0] == pytest.approx(means.mean())
    assert value[1:, 0].mean() == pytest.approx(means.mean(), abs=0.02)
    assert value[1:, 0].var() == pytest.approx(means.var(ddof=1) / 5, rel=0.05)


def test_one_cluster_has_no_interval():
    task = accuracy_task([0.2, 0.4], [1.0, 0.98], cluster=np.zeros(ITEMS, np.int64), chance=0.1)
    for row in rows_of([task], [0.99]):
        assert row.value == pytest.approx(0.3)
        assert (row.interval_low, row.interval_high) == (None, None)
        assert (row.low_open, row.high_open) == (False, False)
    assert points_of([task], ["a", "b"])[1].retained_low is None


def test_percentiles_order_infinities():
    low, high = percentile_interval(np.array([-np.inf, *range(98), np.inf]))
    assert (low, high) == (1, 96)
    low, high = percentile_interval(np.array([-np.inf] * 5 + [0.5] * 90 + [np.inf] * 5))
    assert (low, high) == (-np.inf, np.inf)


def test_points_of_an_accuracy_curve():
    task = accuracy_task([0.6, 0.2, 0.4], [0.9, 0.98, 1.02])
    task.value[0, 0] = np.inf
    dense, failed, low, mid = points_of([task], ["x", "y", "z"], replicates=100)[:4]
    assert [dense.level, failed.level, low.level, mid.level] == ["dense", "x", "y", "z"]
    assert (dense.sparsity, dense.value, dense.retained, dense.fitted) == (0, DENSE, 1, 1)
    assert (failed.status, failed.sparsity) == ("failed", 0.6)
    assert failed.value is failed.fitted is failed.retained is failed.retained_low is None
    assert (low.status, low.retained, low.fitted) == ("ok", pytest.approx(0.98), 1)
    assert mid.fitted == pytest.approx(1)
    assert low.retained_low < low.retained < low.retained_high
    assert low.added_loss is low.added_loss_low is None


def test_points_of_a_loss_curve():
    dense, one, two = points_of([loss_task([0.2, 0.4], [0.03, 0.01])], ["a", "b"])
    assert (dense.added_loss, dense.fitted, dense.retained) == (0, 0, None)
    assert one.added_loss == pytest.approx(0.03)
    assert one.value == pytest.approx(dense.value + 0.03)
    assert one.fitted == two.fitted == pytest.approx(0.02)


@pytest.mark.parametrize("bar", [0, 1, 1.5, float("nan")])
def test_bar_out_of_range(bar):
    with pytest.raises(AtlasError, match="bars"):
        rows_of([accuracy_task([0.5], [1.0])], [bar])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(3)}, "weight"),
        ({"zeros": np.zeros((2, ITEMS))}, "zeros"),
        ({"weight": np.zeros(ITEMS)}, "positive"),
        ({"entries": np.zeros((1, ITEMS))}, "no counted entries"),
        ({"dense_zeros": np.zeros(ITEMS)}, "together"),
        ({"kind": "loss", "chance": 0.5}, "chance"),
        ({"kind": "f1"}, "f1"),
    ],
)
def test_arrays_that_do_not_fit_together(change, message):
    with pytest.raises(ValueError, match=message):
        replace(accuracy_task([0.5], [1.0]), **change)


def test_tasks_and_names_of_other_level_counts():
    tasks = [accuracy_task([0.5], [1.0]), accuracy_task([0.5, 0.6], [1.0, 1.0])]
    with pytest.raises(ValueError, match="level counts"):
        rows_of(tasks)
    with pytest.raises(ValueError, match="names"):
        points_of(tasks[:1], ["a", "b"])
