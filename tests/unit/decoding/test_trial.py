"""How often something is timed: by a clock that is made up."""

from __future__ import annotations

import math

import pytest

from sparsity_atlas.decoding import trial
from sparsity_atlas.decoding.trial import rounds_of, timed


class Clock:
    """Seconds that go by where a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(trial.time, name, made)
    return made


@pytest.mark.parametrize(
    ("most", "longest", "wanted"),
    [
        (10, math.inf, 10),
        # The fifth begins when 4 seconds have gone by.
        (10, 4.5, 5),
        (10, 4.0, 5),
        # However long they take.
        (10, 0.1, 3),
        (2, 0.1, 2),
    ],
)
def test_rounds_end_by_the_clock(clock: Clock, most: int, longest: float, wanted: int) -> None:
    done = 0
    for _ in rounds_of(most, longest):
        clock.now += 1
        done += 1
    assert done == wanted


def test_what_is_slow_is_timed_less_often(clock: Clock) -> None:
    calls = 0

    def slow() -> None:
        nonlocal calls
        calls += 1
        # The first one compiles.
        clock.now += 100 if calls == 1 else 0.25

    took = timed([slow, slow], "cpu", 20, 1.2)
    # A round that is not timed, and three that begin within 1.2 seconds.
    assert calls == 2 * (1 + 3)
    assert took.median == pytest.approx(250e3)
    assert took.spread == 0
