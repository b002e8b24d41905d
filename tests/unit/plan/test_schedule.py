"""How long jobs take that wait for each other, by hand."""

from __future__ import annotations

import time

import pytest

from sparsity_atlas.plan import schedule
from sparsity_atlas.plan.schedule import Key, makespan


def test_jobs_that_wait_for_nothing_fill_what_runs_at_once() -> None:
    jobs = [(Key("metrics", model), 10.0) for model in "abcde"]
    assert makespan([], jobs, 1) == 50
    assert makespan([], jobs, 2) == 30  # the fifth runs alone
    assert makespan([(Key("dense", "f"), 4.0)], jobs, 2) == 30
    assert makespan([], [], 3) == 0


def test_a_job_waits_for_those_of_its_model_and_site() -> None:
    jobs = [
        (Key("curve", "a", "topp", "up"), 1.0),
        (Key("search", "a", "topp", "up"), 10.0),
        (Key("search", "a", "topp", "gate"), 30.0),
        (Key("model_summary", "a"), 2.0),
        (Key("search", "b", "topp", "up"), 5.0),
    ]
    dense = [(Key("dense", "a"), 3.0), (Key("dense", "b"), 1.0)]
    # a: 3, then up to 13 and gate to 33, up's curve to 14, the summary behind all to 35; b: 1, 6.
    assert makespan(dense, jobs, 9) == 35
    # Two at once: b's search 1 to 6, a's of up 3 to 13, of gate 6 to 36, curve 13 to 14, summary to 38.
    assert makespan(dense, jobs, 2) == 38
    assert makespan(dense[:1], [*jobs, dense[1]], 1) == 4 + 48


def test_of_very_many_jobs_the_bound_is_given_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [(Key("evaluate", str(i % 9), "topp", str(i % 7)), 3.0) for i in range(50_000)]
    began = time.process_time()
    assert makespan([], jobs, 10) == pytest.approx(15_000)
    assert time.process_time() - began < 2
    monkeypatch.setattr(schedule, "MOST", 0)
    chain = [(Key("search", "a"), 30.0), (Key("dense", "a"), 4.0), (Key("dense", "b"), 1.0)]
    assert makespan([], chain, 5) == 34


def test_nothing_of_a_model_waits_for_its_metrics() -> None:
    site = {"site": "input"}
    waiting = [
        (Key("capture", "m", **site), 10.0),
        (Key("metrics", "m", **site), 60.0),
        (Key("search", "m", "topp", **site), 30.0),
        (Key("output_error", "m", "topp", **site), 25.0),
    ]
    assert makespan([], waiting, 2) == 70.0
    assert makespan([], waiting, 1) == 125.0


def test_jobs_with_a_model_wait_for_a_gpu_and_others_do_not() -> None:
    searches = [(Key("search", "m", "topp", site), 10.0) for site in ("up", "gate", "input")]
    metrics = [(Key("metrics", "n", site=site), 8.0) for site in ("up", "gate")]
    assert makespan([], [*searches, *metrics], 8, 1) == 30
    assert makespan([], [*searches, *metrics], 8, 2) == 20
    assert makespan([], [*searches, *metrics], 8) == 10
    # Of two cores one has a model, or both do: 10 and 10, 10 and 8, 8.
    assert makespan([], [*searches, *metrics], 2, 1) == 30
    assert makespan(searches[:1], searches[1:], 8, 1) == 30
    assert makespan([], [*searches, *metrics], 2, 5) == makespan([], [*searches, *metrics], 2)
