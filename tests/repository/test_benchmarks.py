"""What a benchmark names of the package is there, and what it says of the time left is so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_functions_whose_seconds_are_counted_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("host", "measure", "suite"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import host

    counted = []

    class Phases:
        def wrap(self, owner: Any, name: str, phase: str) -> None:
            counted.append((getattr(owner, name), phase))

    host.name_phases(Phases())
    assert len({phase for _, phase in counted}) > 10


def test_what_is_said_of_the_time_left_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import time_left

    # Nothing up to 15 s of 100, then twice what is left, then what is.
    every = time_left.ticks([(15.0, 170.0), (60.0, 40.0)], 100.0, 10.0)
    assert [one.now for one in every] == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [one.said for one in every] == [None, 165, 155, 145, 135, 40, 30, 20, 10]
    assert time_left.verdict(every, 100.0) == (
        "From a tenth of 100 s on 4 of 9 ticks (44%) lie within a factor of 1.5; 0.00 to 2.70, "
        "the worst 0.00"
    )
    assert "the worst 2.70" in time_left.verdict(every[1:], 100.0)
    assert "smaller --step" in time_left.verdict([], 100.0)
