"""What a benchmark names of the package is there, and what it says of the time left is so."""

from __future__ import annotations

import json
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


def test_a_plan_is_set_beside_what_jobs_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import planned

    empty = dict.fromkeys(planned.KEY, "")
    said = [
        {**empty, "rule": "model", "model": "m", "start": 9.0, "work": 1.0},
        *(
            {**empty, "rule": "capture", "model": "m", "site": site, "start": 2.0, "work": work}
            for site, work in (("up", 7.0), ("gate", 0.0))
        ),
        {**empty, "rule": "search", "model": "failed", "start": 5.0, "work": 5.0},
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/plan.json").write_text(json.dumps({"jobs": said}))
    (tmp_path / "benchmarks/m").mkdir(parents=True)
    for name, rule, wildcards, seconds in (
        ("model", "model", {"model": "m"}, 20.0),
        ("up", "capture", {"model": "m", "site": "up"}, 2.0),
        ("gate", "capture", {"model": "m", "site": "gate"}, 8.0),
        ("tables", "tables", {}, 3.0),  # not planned
    ):
        record = {"rule_name": rule, "wildcards": wildcards, "s": seconds}
        (tmp_path / f"benchmarks/m/{name}.jsonl").write_text(json.dumps(record) + "\n")
    assert planned.rows(tmp_path) == [
        ("model", 1, 10.0, 20.0),
        ("capture", 2, 11.0, 10.0),
        ("all", 3, 21.0, 30.0),
    ]
    monkeypatch.setattr(sys, "argv", ["planned.py", str(tmp_path)])
    planned.main()
    assert capsys.readouterr().out.endswith("1 of 2 rules lie within 30 %\n")
