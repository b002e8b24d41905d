"""The time that is left: forecasts of jobs, corrected by jobs that were seen."""

from __future__ import annotations

import heapq
import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sparsity_atlas.config.schema import parse
from sparsity_atlas.plan.corrections import LIGHT, TELLING, Seconds
from sparsity_atlas.plan.expected_seconds import expected
from sparsity_atlas.plan.schedule import Key
from sparsity_atlas.plan.time_left import ALONE, FEWER, TimeLeft

ROOT = Path(__file__).parents[3]


def left(counts: dict[str, int], forecast: Iterable[tuple[Key, float]]) -> TimeLeft:
    """Of jobs that work from the beginning; those without a model are all start."""
    parts = [
        (key, Seconds(0.0, one) if key.rule not in LIGHT else Seconds(one)) for key, one in forecast
    ]
    return TimeLeft(counts, parts)


SEARCHES = [Key("search", model, "topp", "input") for model in ("a", "b", "c")]


def test_nothing_is_said_before_anything_was_seen() -> None:
    time = left({"model": 1}, [(Key("model", "a"), 4.0)])
    time.begin(0, Key("model", "a"), 0.0)
    assert time.seconds_left(1.0) is None


def test_jobs_of_another_rule_do_not_get_the_mean_of_all() -> None:
    """A search is forty times a manifest: by the mean of what has finished, this run were over soon."""
    models = [Key("model", model) for model in "abc"]
    forecast = [*((key, 4.0) for key in models), *((key, 160.0) for key in SEARCHES)]
    time = left({"model": 3, "search": 3}, forecast)
    for number, key in enumerate(models):
        time.begin(number, key, 4.0 * number)
        time.finish(number, 4.0 * (number + 1))
    assert time.seconds_left(12.0) == pytest.approx(480.0)


def test_the_ratio_of_seen_to_forecast_corrects_what_is_left() -> None:
    forecast = [(key, 100.0) for key in SEARCHES]
    time = left({"search": 3}, forecast)
    time.begin(0, SEARCHES[0], 0.0)
    time.finish(0, 300.0)
    assert time.seconds_left(300.0) == pytest.approx(600.0, rel=0.1)


def test_a_rule_is_corrected_by_its_own_jobs_before_others() -> None:
    pages = [Key("curve", "a", "topp", site) for site in ("input", "up")]
    searches = [Key("search", "a", "topp", site) for site in ("input", "up")]
    time = left(
        {"curve": 2, "search": 2},
        [*((key, 2.0) for key in pages), *((key, 100.0) for key in searches)],
    )
    for number, (key, seconds) in enumerate([(pages[0], 20.0), (searches[0], 110.0)]):
        time.begin(number, key, 0.0)
        time.finish(number, seconds)
    assert time.seconds_left(130.0) == pytest.approx(110 + 20, rel=0.1)


def test_levels_of_a_search_count_before_it_ends() -> None:
    time = left({"model": 1, "search": 1}, [(Key("model", "a"), 4.0), (SEARCHES[0], 60.0)])
    time.begin(0, Key("model", "a"), 0.0)
    time.finish(0, 4.0)
    time.begin(1, SEARCHES[0], 4.0)
    # A level of six takes 500 s, and what is before it 100.
    time.reach(1, 0.01, 6, 109.0)
    time.reach(1, 1, 6, 604.0)
    assert time.seconds_left(604.0) == pytest.approx(
        2500, rel=0.15
    )  # a sixth was seen, the forecast says 60
    said = time.seconds_left(604.0)
    assert said is not None
    assert time.seconds_left(704.0) == pytest.approx(said - 100)
    for level in range(2, 6):
        time.reach(1, level, 6, 104.0 + 500 * level)
    assert time.seconds_left(2604.0) == pytest.approx(500, rel=0.03)
    assert time.seconds_left(2904.0) == pytest.approx(200, rel=0.08)
    assert time.seconds_left(3904.0) == 0


def test_a_slow_start_is_not_taken_for_slow_levels() -> None:
    """A search that took a minute to begin beside its levels of 15 s was said to take twice as long."""
    forecast = [(one, Seconds(5.0, 55.0)) for one in SEARCHES[:2]]
    time = TimeLeft({"search": 2}, forecast)
    time.begin(0, SEARCHES[0], 0.0)
    time.reach(0, 0.1, 6, 61.0)
    time.reach(0, 1, 6, 75.0)
    assert time.seconds_left(75.0) == pytest.approx(75 + 150, rel=0.1)


def test_a_job_that_is_overdue_is_seen_before_it_ends() -> None:
    dense = [Key("dense", model) for model in "abcd"]
    time = left(
        {"model": 1, "dense": 4}, [(Key("model", "a"), 4.0), *((one, 40.0) for one in dense)]
    )
    time.begin(0, Key("model", "a"), 0.0)
    time.finish(0, 4.0)
    time.begin(1, dense[0], 4.0)
    assert time.seconds_left(4.0) == pytest.approx(160.0)
    assert time.seconds_left(154.0) > 3 * 150


def test_jobs_that_run_at_once_share_the_time_and_the_last_ones_do_not() -> None:
    last = [(Key(rule), 10.0) for rule in ("tables", "figures", "page")]
    forecast = [*((key, 100.0) for key in SEARCHES), *last]
    time = left({"search": 3, "tables": 1, "figures": 1, "page": 1}, forecast)
    time.begin(0, SEARCHES[0], 0.0)
    time.begin(1, SEARCHES[1], 0.0)
    time.finish(0, 100.0)
    time.finish(1, 100.0)
    # One search is left, which no second core can share.
    assert time.seconds_left(100.0) == pytest.approx(130.0, rel=0.05)


def test_what_was_seen_in_a_crowd_took_longer_than_what_comes_will() -> None:
    """Of 32 jobs at once each has others beside it, of the last ones none."""
    keys = [Key("search", "a", "topp", str(number)) for number in range(33)]
    last = [Key(rule) for rule in ("tables", "figures", "page")]
    forecast = [*((key, 100.0) for key in keys), *((key, 10.0) for key in last)]
    time = left({"search": 33, "tables": 1, "figures": 1, "page": 1}, forecast)
    for number in range(32):
        time.begin(number, keys[number], 0.0)
    for number in range(32):
        time.finish(number, 200.0)
    said = 200 * 16**FEWER + 30 * 16**ALONE
    assert time.seconds_left(200.0) == pytest.approx(said, rel=0.03)
    time.begin(32, keys[32], 200.0)
    time.finish(32, 400.0)
    time.begin(33, last[0], 400.0)
    time.finish(33, 410.0)
    # It ran alone, and the others will.
    assert time.seconds_left(410.0) == pytest.approx(20.0, rel=0.05)


def test_a_slow_start_of_all_jobs_is_not_taken_for_slow_work() -> None:
    """Imports with 32 at once took three to nine times their time, and passes hardly longer."""
    models = [Key("model", model) for model in "abc"]
    dense = Key("dense", "a")
    parts = [Seconds(5.0, 0.0)] * 3 + [Seconds(5.0, 10.0)] + [Seconds(5.0, 95.0)] * 3
    counts = {"model": 3, "dense": 1, "search": 3}
    time = TimeLeft(counts, zip([*models, dense, *SEARCHES], parts, strict=True))
    for number, key in enumerate([*models, dense]):
        time.begin(number, key, 0.0)
    for number in range(3):
        time.finish(number, 30.0)
    time.finish(3, 41.0)
    # Of 41 s 30 were start: what is left is 30 and 95 * 1.1 each, by one correction 15 * 41.
    found = time.seconds_left(41.0)
    assert found is not None
    assert found == pytest.approx(30 + 95 * 1.1, rel=0.25)


def test_a_part_of_the_grid_is_not_charged_for_the_rest() -> None:
    time = left({"search": 1}, [(key, 100.0) for key in SEARCHES])
    time.begin(0, Key("search", "a", "topp", "input"), 0.0)
    time.reach(0, 0.01, 100, 0.0)
    time.reach(0, 52, 100, 52.0)
    assert time.seconds_left(52.0) == pytest.approx(48.0, rel=0.01)


def test_rules_that_were_not_forecast_take_nothing() -> None:
    time = left({"theirs": 5, "model": 1}, [(Key("model", "a"), 4.0)])
    time.begin(0, Key("model", "a"), 0.0)
    time.finish(0, 4.0)
    time.begin(1, Key("theirs"), 4.0)
    time.finish(1, 5.0)
    assert time.seconds_left(5.0) == pytest.approx(0.0)


def test_searches_that_end_early_say_it_of_others() -> None:
    """A search says how many levels it takes at the most."""
    time = left({"search": 3}, [(key, 100.0) for key in SEARCHES])
    for number, key in enumerate(SEARCHES[:2]):
        time.begin(number, key, 0.0)
    for done in (0.01, 1, 2, 3, 4):
        for number in range(2):
            time.reach(number, done, 5, 25.0 * done)
    time.finish(0, 100.0)
    # It had said 5 levels, 125 s in all; the other has as many, and nobody knows of its fifth.
    time.begin(2, SEARCHES[2], 100.0)
    assert time.seconds_left(100.0) == pytest.approx((100 + 125) / 2, rel=0.03)
    time.reach(2, 0.01, 5, 100.2)
    time.reach(1, 5, 5, 125.0)
    time.finish(1, 125.0)
    time.reach(2, 2, 5, 150.0)
    assert time.seconds_left(150.0) == pytest.approx((4.5 - 2) * 25, rel=0.02)


def test_metrics_of_a_wide_model_say_nothing_of_tables_and_figures() -> None:
    """They took eighty times what was forecast of them, on one core each."""
    metrics = [Key("metrics", "a", site=site) for site in ("input", "up")]
    last = [Key(rule) for rule in ("tables", "figures", "page")]
    curves = [Key("curve", "a", "topp", site) for site in ("input", "up")]
    forecast = [(key, 1.0) for key in (*metrics, *curves)] + [(key, 5.0) for key in last]
    counts = {"metrics": 2, "curve": 2, "tables": 1, "figures": 1, "page": 1}
    time = left(counts, forecast)
    for number, (key, seconds) in enumerate([(metrics[0], 80.0), (curves[0], 2.0)]):
        time.begin(number, key, 0.0)
        time.finish(number, seconds)
    assert time.seconds_left(80.0) == pytest.approx(80 + 2 * 15, rel=0.4)


def test_whichever_capture_is_first_does_the_work_of_all() -> None:
    forecast = [
        (Key("capture", "a", site="up"), 50.0),
        (Key("capture", "a", site="gate"), 2.0),
        (Key("capture", "b", site="gate"), 70.0),
    ]
    time = left({"capture": 3}, forecast)
    time.begin(0, Key("capture", "a", site="gate"), 0.0)
    time.finish(0, 50.0)
    # By itself it had taken 25 times what was forecast.
    assert time.seconds_left(50.0) == pytest.approx(72.0)
    time.begin(1, Key("capture", "b", site="gate"), 50.0)
    time.finish(1, 120.0)
    assert time.seconds_left(120.0) == pytest.approx(2.0)


def needs(key: Key, jobs: list[Key]) -> set[int]:
    """The jobs that one waits for, roughly."""
    before = {
        **dict.fromkeys(("capture", "dense"), ("model",)),
        **{"metrics": ("capture",), "search": ("dense", "calibrate"), "sensitivity": ("capture",)},
        **{"curve": ("search",), "output_error": ("search", "capture")},
        **{"calibrate": ("capture",), "evaluate": ("dense",), "answers": ("model",)},
        **{"truthfulness": ("answers", "evaluate")},
        **{
            "model_summary": ("curve", "output_error"),
            "figures": ("tables",),
            "page": ("figures",),
        },
    }
    if key.rule == "tables":
        return {i for i, one in enumerate(jobs) if one.rule not in ("tables", "figures", "page")}
    same = [i for i, one in enumerate(jobs) if one.rule in before.get(key.rule, ())]
    return {
        i
        for i in same
        if jobs[i].model == key.model and (not key.site or jobs[i].site in ("", key.site))
    }


def run(
    jobs: list[Key],
    forecast: list[tuple[Key, Seconds]],
    seconds: list[float],
    cores: int,
    starts: list[float] | None = None,
    every: int = 1,
) -> list[tuple[float, float]]:
    """Go through a run: (share of it that was past, forecast left over what was left), often.

    Of so many ends of jobs, one is looked at.

    Args:
        jobs: of the run.
        forecast: what is expected of them.
        seconds: what each takes.
        cores: that run at once.
        starts: of jobs that say how much of their work is done the seconds until they begin with it; None:
            nobody says.
        every: of so many ends of jobs, one is looked at.
    """
    time = TimeLeft(dict(Counter(key.rule for key in jobs)), forecast)
    waits = [needs(key, jobs) for key in jobs]
    waiting, done, running, now, said = set(range(len(jobs))), set(), [], 0.0, []
    while waiting or running:
        for job in sorted(job for job in waiting if waits[job] <= done):
            if len(running) < cores:
                waiting.discard(job)
                time.begin(job, jobs[job], now)
                heapq.heappush(running, (now + seconds[job], job))
        ends, job = heapq.heappop(running)
        for step in range(1, 10):
            at = now + (ends - now) * step / 10
            for end, other in [*running, (ends, job)] if starts else ():
                work = seconds[other] - starts[other]
                if jobs[other].rule in TELLING and end - at < work:
                    time.reach(other, 1 - (end - at) / work, 1.0, at)
            if len(done) % every == 0:
                said.append((at, time.seconds_left(at)))
        now = ends
        done.add(job)
        time.finish(job, now)
    return [(at / now, left / (now - at)) for at, left in said if left is not None]


PARTS = {
    **{"run_config": (1, 0), "model": (5, 0), "capture": (4, 3), "metrics": (1, 2)},
    **{"dense": (6, 8), "search": (6, 36), "output_error": (5, 4), "curve": (1, 0)},
    **{"tables": (1, 1), "figures": (2, 9), "page": (2, 4)},
}


def told(slow_start: dict[str, float], slow_work: float = 1.0) -> list[tuple[float, float, float]]:
    """Go through a run of one model, one job after the other: (seconds past, said, left), each second.

    Args:
        slow_start: by rule, how much longer a start is than forecast.
        slow_work: the same of all work with a model.
    """
    rules = [*PARTS, "search", "output_error", "curve"]
    order = sorted(rules, key=[*PARTS].index)
    keys = [
        Key(
            rule,
            "" if rule in ("run_config", "tables", "figures", "page") else "m",
            site=str(place),
        )
        for place, rule in enumerate(order)
    ]
    time = TimeLeft(dict(Counter(order)), [(key, Seconds(*PARTS[key.rule])) for key in keys])
    now, said = 0.0, []
    for number, key in enumerate(keys):
        start, work = PARTS[key.rule]
        start *= slow_start.get(key.rule, 1.0)
        work *= slow_work if key.rule not in LIGHT else 1.0
        unseen = start if key.rule in TELLING else start + work
        time.begin(number, key, now)
        past = 0.0
        while past < start + work:
            past += 0.25
            if key.rule in TELLING and past >= start:
                time.reach(number, min(max((past - start) / work, 1e-9), 1.0), 1.0, now + past)
            # A job that is nearly over is never said to be so: it might be overdue.
            if past <= 0.8 * unseen or (key.rule in TELLING and past > start):
                said.append((now + past, time.seconds_left(now + past)))
        now += start + work
        time.finish(number, now)
    return [(at, left, now - at) for at, left in said if left is not None]


def test_a_forecast_that_is_right_says_what_is_left() -> None:
    every = told({})
    assert len(every) > 400
    for at, said, left in every:
        assert said == pytest.approx(left, rel=1e-6), at


def test_a_long_start_is_corrected_as_a_start() -> None:
    """Kernels are compiled in the first job that runs the tasks; its work and others' are as foretold."""
    every = told({"dense": 5.0})
    after = next(at for at, _, left in every if left < 2 * 42 + 2 * 9 + 2 + 19)
    for at, said, left in every:
        if at > after - 6:
            assert said == pytest.approx(left, rel=0.25), at
    # While it starts, nothing is taken for slow work.
    assert all(said < 1.35 * left for at, said, left in every if at < after)


def test_a_job_that_waits_for_a_gpu_does_not_start_slowly() -> None:
    """Snakemake starts more jobs with a model than there are GPUs; they wait before they load it."""
    time = TimeLeft({"search": 3}, [(one, Seconds(5.0, 95.0)) for one in SEARCHES], (16, 1))
    for number, key in enumerate(SEARCHES):
        time.begin(number, key, 0.0)
    for number in (1, 2):
        time.hold(number, 3.0)
        time.hold(number, 4.0)  # said once more
    time.reach(0, 1e-9, 6, 5.0)
    time.reach(0, 3, 6, 52.5)
    # Of each of the others three seconds have passed.
    assert time.seconds_left(52.5) == pytest.approx(47.5 + 97 + 97, rel=0.01)
    time.reach(0, 6, 6, 100.0)
    time.finish(0, 100.0)
    time.go(1, 100.0)
    time.reach(1, 1e-9, 6, 102.0)
    time.reach(1, 3, 6, 149.5)
    assert time.seconds_left(149.5) == pytest.approx(47.5 + 97, rel=0.01)


@pytest.mark.parametrize("slow", [0.25, 4.0])
def test_slow_work_is_corrected_as_soon_as_some_is_done(slow: float) -> None:
    """Starts are as foretold: by one correction, the whole would be as slow or nothing at all."""
    every = told({}, slow)
    begun = PARTS["run_config"][0] + PARTS["model"][0] + 4 + 3 * slow + 1 + 2 + 6
    for at, said, left in every:
        if at > begun + 1:
            assert said == pytest.approx(left, rel=0.25), at


@pytest.mark.parametrize("slow", [0.3, 1, 8])
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("tell", [False, True])
def test_the_default_run_is_foretold_from_a_tenth_on(slow: float, cores: int, tell: bool) -> None:
    """Seconds as the benchmarks of 30 November 2026 have them, each job a little off."""
    config = parse(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    forecast = expected(config, ROOT / "none")
    level = {"zoo-small": 1.2, "zoo-medium": 2.3, "zoo-large": 5.0, "zoo-medium-relu": 2.2}
    level |= {"zoo-medium-moe": 3.0, "zoo-medium-diffusion": 14.3}
    error = {"zoo-small": 6.5, "zoo-large": 9.5}
    draw = random.Random(cores)
    jobs = [key for key, _ in forecast]
    draw.shuffle(jobs)

    def seconds(key: Key) -> float:
        one = level.get(key.model, 0.0)
        own = {
            **{"run_config": 1.0, "model": 5.2, "capture": 4.4, "metrics": 1.4, "curve": 1.0},
            **{"dense": 5.8 + 1.25 * one, "search": 5.7 + draw.choice([5, 6, 6]) * one},
            **{"output_error": error.get(key.model, 7.7), "sensitivity": 17.0},
            **{"model_summary": 0.5, "tables": 2.3, "figures": 13.2, "page": 6.8},
        }
        return slow * own[key.rule] * draw.lognormvariate(0, 0.15)

    taken = [seconds(key) for key in jobs]
    begin = {"capture": 3.5, "metrics": 0.8, "dense": 5.8, "search": 5.7, "output_error": 5.0}
    begin |= {"sensitivity": 5.0, "figures": 2.0, "page": 2.0}
    starts = [
        min(slow * begin.get(key.rule, 0.0), 0.9 * one)
        for key, one in zip(jobs, taken, strict=True)
    ]
    shown = run(jobs, forecast, taken, cores, starts if tell else None)
    late = [ratio for past, ratio in shown if 0.1 <= past <= 0.97]
    assert min(late) > 1 / 1.5
    assert max(late) < 1.5


# A model of others on five real data sets, by rule and site: processor seconds as forecast, and as seen.
REAL = {
    ("run_config", ""): (0.8, 1.3),
    ("model", ""): (5.4, 3.9),
    ("capture", "intermediate"): (3.5, 2.7),
    ("capture", "input"): (3.0, 4.7),
    ("metrics", "intermediate"): (0.8, 0.9),
    ("metrics", "input"): (2.4, 0.8),
    ("dense", ""): (11.3, 11.1),
    ("search", "intermediate"): (34.9, 33.9),
    ("search", "input"): (31.9, 35.1),
    ("output_error", "intermediate"): (6.3, 5.0),
    ("output_error", "input"): (6.3, 5.2),
    ("curve", "intermediate"): (1.4, 1.2),
    ("curve", "input"): (1.4, 0.9),
    ("model_summary", ""): (0.8, 0.7),
    ("tables", ""): (1.0, 1.0),
    ("figures", ""): (5.3, 4.5),
    ("page", ""): (2.7, 2.7),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("slow", [0.3, 1, 4])
@pytest.mark.parametrize("cores", [1, 2])
def test_a_run_of_one_model_is_foretold_from_a_tenth_on(
    cores: int, slow: float, turned: bool
) -> None:
    keys = {
        one: Key(one[0], "" if one[0] in ("run_config", "tables", "figures", "page") else "real")
        for one in REAL
    }
    keys = {
        one: replace(key, site=one[1], criterion="topp" * (one[0] not in ("capture", "metrics")))
        if one[1]
        else key
        for one, key in keys.items()
    }
    # All start alike; what has no evaluations does little else, but for drawing.
    starts = {
        one: min(said, 5.5) if one[0] not in LIGHT else said for one, (said, _) in REAL.items()
    }
    starts |= {one: 0.5 * REAL[one][0] for one in [("figures", ""), ("page", "")]}
    starts |= {one: 0.8 for one in REAL if one[0] == "metrics"}
    forecast = [
        (keys[one], Seconds(starts[one], said - starts[one])) for one, (said, _) in REAL.items()
    ]
    order = [*REAL][::-1] if turned else [*REAL]
    begin = {"search": 6.5, "dense": 6.0, "figures": 2.0, "page": 1.5}
    shown = run(
        [keys[one] for one in order],
        forecast,
        [slow * REAL[one][1] for one in order],
        cores,
        [slow * begin.get(one[0], 0.7 * REAL[one][1]) for one in order],
    )
    late = [ratio for past, ratio in shown if 0.1 <= past <= 0.97]
    assert min(late) > 1 / 1.5
    assert max(late) < 1.5


# SmolLM2-135M (S; as a chat C; in float32 F) and the zoo (Z) on two H200 and 32 cores, by
# workflow/config/real.yaml: mean seconds by rule and model.
SUITE = {
    **{("model", "S"): 24, ("capture", "S"): 35, ("dense", "S"): 37, ("curve", "S"): 4},
    **{("model", "Z"): 13, ("capture", "Z"): 16, ("dense", "Z"): 19, ("curve", "Z"): 2},
    **{("search", "S"): 105, ("search", "C"): 64, ("search", "F"): 154, ("search", "Z"): 23},
    **{("calibrate", "S"): 49, ("evaluate", "S"): 28, ("answers", "S"): 38},
    **{("sensitivity", "S"): 58, ("truthfulness", "S"): 21, ("output_error", "Z"): 21},
    **{("metrics", "Z"): 6, ("model_summary", "S"): 2, ("model_summary", "Z"): 3},
    **{("run_config", ""): 6, ("tables", ""): 17, ("figures", ""): 40, ("page", ""): 42},
}
# What goes by tensors, and by whether an FFN's inside is foretold.
WIDE = {"input": 39, "qkv_input": 39, "o_input": 35, "all_inputs": 134, "all_linear_inputs": 210}


def suite_seconds(key: Key) -> float:
    """Of a job of that run."""
    kind = {"smollm2": "S", "smollm2-chat": "C", "smollm2-float32": "F", "": ""}.get(key.model, "Z")
    if key.rule == "metrics" and kind != "Z":
        return WIDE.get(key.site, 102)
    if key.rule == "output_error" and kind != "Z":
        inside = key.site in ("intermediate", "gate", "up")
        return 30 if "@" in key.site else 90 if inside else 45
    return SUITE.get((key.rule, kind)) or SUITE[key.rule, "S"]


def suite(folder: Path) -> list[tuple[Key, Seconds]]:
    """What is forecast of that run."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    real = yaml.safe_load((ROOT / "workflow/config/real.yaml").read_text(encoding="utf-8"))
    (folder / "model.gguf").write_bytes(b"")
    os.truncate(folder / "model.gguf", 98_362_432)
    for name, entry in real["models"].items():
        if "gguf" in entry:
            entry["gguf"] = str(folder / "model.gguf")
        else:
            entry["path"] = str(ROOT / config["models"][name]["path"])
    for name, value in real.items():
        catalogue = isinstance(config.get(name), dict)
        config[name] = {**config[name], **value} if catalogue else value
    return expected(parse(config), folder / "none")


def test_a_real_suite_is_foretold(tmp_path: Path) -> None:
    forecast = suite(tmp_path)
    jobs = [key for key, _ in forecast]
    draw = random.Random(0)
    seconds = [suite_seconds(key) * draw.lognormvariate(0, 0.15) for key in jobs]
    begin = {"metrics": 3.0, "figures": 4.0, "page": 4.0}
    starts = [
        min(begin.get(key.rule, 20.0), 0.8 * one) for key, one in zip(jobs, seconds, strict=True)
    ]
    shown = run(jobs, forecast, seconds, 32, starts, every=24)
    late = [ratio for past, ratio in shown if 0.1 <= past <= 0.97]
    within = sum(1 / 1.5 < ratio < 1.5 for ratio in late)
    assert within > 0.9 * len(late)
    assert min(late) > 1 / 1.7
    assert max(late) < 1.7
