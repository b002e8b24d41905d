"""Lines in which a stage says how much of its work is done."""

from __future__ import annotations

import logging

import pytest

from sparsity_atlas import progress
from sparsity_atlas.progress import Progress, ShareDone, read, told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_what_is_said_can_be_read_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparsity_atlas"):
        Progress("evaluated", 1).reach(0.2848)
        Progress("evaluated", 12, "levels", most=True).reach(3.25)
        assert list(told("abc", "drawn", "figures")) == ["a", "b", "c"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:3] == [
        "evaluated 0.2848 of 1",
        "evaluated 3.25 of at most 12 levels",
        "drawn 1 of 3 figures",
    ]
    assert lines[-1] == "drawn 3 of 3 figures"
    assert [read(line) for line in lines[:2]] == [(0.2848, 1.0), (3.25, 12.0)]


@pytest.mark.parametrize(
    "line",
    [
        "level 0.9: 47.4 % sparse, prose 3.7 nats (dense 3.6), 2.17 of the damage; took 20 s, the last",
        "drawn 1 of 3 figures, and more",
        "the first 3 of 9 documents are left out",
        "3 of 10 answers are captured",
        "kernels: compiled (numba)",
    ],
)
def test_other_lines_say_nothing_of_the_work(line: str) -> None:
    assert read(line) is None


def test_it_is_not_said_too_often(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    one = Progress("made", 1000, "passes")
    with caplog.at_level(logging.INFO, "sparsity_atlas"):
        one.reach(0)  # nothing is done yet
        for done in range(1, 1001):
            one.reach(done)
            clock[0] += 0.5
        one.reach(1000)
    said = [read(record.getMessage()) for record in caplog.records]
    assert said[:3] == [(1.0, 1000.0), (21.0, 1000.0), (41.0, 1000.0)]
    assert said[-1] == (1000.0, 1000.0)
    assert len(said) == 51


def test_the_last_is_said_however_soon_it_comes(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sparsity_atlas"):
        list(told(range(4), "drawn", "figures"))
    assert [record.getMessage()[:7] for record in caplog.records] == ["drawn 1", "drawn 4"]


def test_the_share_of_a_node_goes_by_positions() -> None:
    said: list[float] = []
    node = ShareDone(["short", "long", "kept"], said.append)
    node.leave("kept")
    node.begin("short", [30, 10])
    node.ran(1, now=True)
    # The other one is taken to be as long until its requests are built.
    assert said == [30 / 80]
    node.know("long", [300, 60])
    node.ran(2, now=True)
    node.end("short")
    node.begin("long", [300, 60])
    node.ran(1, now=False)  # read from an interrupted run's journal
    node.ran(2, now=True)
    assert said[1:] == [40 / 400, 1.0]


def test_a_task_that_fails_does_not_end_the_count() -> None:
    said: list[float] = []
    node = ShareDone(["failed", "well"], said.append)
    node.end("failed")  # before its requests were built
    node.begin("well", [5, 5])
    node.ran(1, now=True)
    node.end("well")
    assert said == [5 / 10]
