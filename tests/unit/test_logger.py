"""What Snakemake's terminal shows of a run: a line a job, the levels of searches, the time left."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.settings import OutputSettingsLoggerInterface

import snakemake_logger_plugin_atlas as plugin
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading import devices
from sparsity_atlas.plan.corrections import Seconds
from sparsity_atlas.plan.schedule import Key


class Settings(OutputSettingsLoggerInterface):
    """Snakemake's defaults."""

    printshellcmds = nocolor = True
    quiet = None
    debug_dag = verbose = show_failed_logs = stdout = dryrun = False


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[plugin.LogHandler]:
    monkeypatch.setattr(plugin, "POLL", 0.01)
    monkeypatch.setattr(plugin, "_expected", None)
    monkeypatch.setattr("sys.argv", ["snakemake"])
    made = plugin.LogHandler(Settings(), None)
    made._default.setStream(io.StringIO())
    yield made
    made.close()


def tell(handler: plugin.LogHandler, event: LogEvent, **fields: Any) -> None:
    record = logging.makeLogRecord({"msg": "", "event": event, **fields})
    handler.emit(record)


def begin(handler: plugin.LogHandler, jobid: int, rule: str, log: Path, **wildcards: str) -> None:
    fields = {"jobid": jobid, "rule_name": rule, "log": [str(log)], "wildcards": wildcards}
    tell(handler, LogEvent.JOB_INFO, **fields)


def shown(handler: plugin.LogHandler, lines: int) -> list[str]:
    """What is on the terminal once it has so many lines."""
    for _ in range(500):
        text = handler._default.stream.getvalue().splitlines()
        if len(text) >= lines:
            return text
        time.sleep(0.01)
    raise AssertionError(text)


def test_levels_of_a_search_are_shown_as_they_end(
    handler: plugin.LogHandler, tmp_path: Path
) -> None:
    log = tmp_path / "search.log"
    log.write_text("level 0.7: 1 % sparse, of a try before; took 9 s, the last\n")
    handler._counts = {"search": 2}
    begin(handler, 1, "search", log, model="m", criterion="topp", site="input")
    assert shown(handler, 1) == [f"{'':>11} search m topp input …"]
    line = "level 0.9: 47.4 % sparse, prose 3.7 nats (dense 3.6), 2.17 of the damage that the bar allows; "
    with log.open("a") as file:
        file.write("kernels: compiled\n" + line)
    time.sleep(0.05)
    assert len(shown(handler, 1)) == 1  # not before it is whole
    with log.open("a") as file:
        file.write("took 20 s, at most 5 more, 100 s\nstopped: far from it\n")
    text = shown(handler, 2)[1]
    assert text.startswith(f"{'':>11} search m topp input: {line}took 20 s, at most 5 more, 100 s")
    # The log of a job that is tried again begins anew.
    log.write_text(
        "level 0.8: 40 % sparse, x, 1.00 of the damage that the bar allows; took 1 s, the last\n"
    )
    assert "level 0.8" in shown(handler, 3)[2]
    tell(handler, LogEvent.JOB_FINISHED, job_id=1)
    assert shown(handler, 4)[3].startswith(f"{'[1/2]':>11} search m topp input done in ")


def test_what_a_search_said_last_is_shown_before_its_end(
    handler: plugin.LogHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "POLL", 60)
    log = tmp_path / "search.log"
    handler._counts = {"search": 1}
    begin(handler, 1, "search", log, model="m", criterion="topp", site="input")
    log.write_text("level 0.9: 1.0 % sparse, x; took 1 s, the last\n")
    tell(handler, LogEvent.JOB_FINISHED, job_id=1)
    _, level, done = shown(handler, 3)
    assert "level 0.9" in level
    assert "done in" in done


def test_the_time_left_begins_with_what_is_expected_of_each_job(
    handler: plugin.LogHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(plugin.time, "monotonic", lambda: clock[0])
    jobs = {Key("model", "m"): Seconds(4.0), Key("search", "m", "topp", "up"): Seconds(0.0, 600.0)}
    plugin.expect(lambda: (list(jobs.items()), (2, 1)))
    handler._counts = {"model": 1, "search": 1}
    begin(handler, 1, "model", tmp_path / "model.log", model="m")
    clock[0] += 4
    tell(handler, LogEvent.JOB_FINISHED, job_id=1)
    assert shown(handler, 2)[1] == f"{'[1/2]':>11} model m done in 4 s, about 10 min left"


def test_a_run_goes_on_where_nothing_can_be_expected(
    handler: plugin.LogHandler, tmp_path: Path
) -> None:
    def damaged() -> plugin.Expected:
        raise AtlasError("results/m/model.json: not JSON")

    plugin.expect(damaged)
    handler._counts = {"model": 1}
    begin(handler, 1, "model", tmp_path / "model.log", model="m")
    assert len(shown(handler, 1)) == 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (99, "99 s"),
        (101, "1.7 min"),
        (145, "2.4 min"),
        (569, "9.5 min"),
        (600, "10 min"),
        (9000, "2.5 h"),
    ],
)
def test_times_are_said_to_within_a_twentieth(seconds: float, said: str) -> None:
    assert plugin.duration(seconds) == said


def test_what_a_job_says_of_its_work_is_heard_and_not_shown(
    handler: plugin.LogHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, float, float]] = []
    monkeypatch.setattr(
        plugin.TimeLeft, "reach", lambda self, job, done, of, now: heard.append((job, done, of))
    )
    log = tmp_path / "dense.log"
    handler._counts = {"dense": 1}
    begin(handler, 1, "dense", log, model="m")
    log.write_text("kernels: compiled (numba)\nevaluated 0.03 of 1\nevaluated 0.2 of")
    for _ in range(500):
        if heard:
            break
        time.sleep(0.01)
    with log.open("a") as file:
        file.write(" 1\ncaptured 8 of 16 sequences\n")
    tell(handler, LogEvent.JOB_FINISHED, job_id=1)
    assert heard == [(1, 0.03, 1.0), (1, 0.2, 1.0), (1, 8.0, 16.0)]
    assert len(shown(handler, 2)) == 2


def test_a_long_job_is_not_passed_over_in_silence(
    handler: plugin.LogHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "SILENCE", 0.2)
    jobs = {Key("model", "m"): Seconds(0.1), Key("dense", "m"): Seconds(100.0, 500.0)}
    plugin.expect(lambda: (list(jobs.items()), (2, 2)))
    handler._counts = {"model": 1, "dense": 1}
    begin(handler, 1, "model", tmp_path / "model.log", model="m")
    tell(handler, LogEvent.JOB_FINISHED, job_id=1)
    begin(handler, 2, "dense", tmp_path / "dense.log", model="m")
    said = shown(handler, 4)[3]
    assert said.startswith(f"{'':>11} dense m …, about ")
    assert said.endswith(" left")


def test_a_wait_for_a_gpu_is_heard(
    handler: plugin.LogHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `loading.devices` says it, of jobs of the workflow's own."""
    heard: list[str] = []
    for name in ("hold", "go"):
        monkeypatch.setattr(
            plugin.TimeLeft, name, lambda self, job, now, name=name: heard.append(name)
        )
    log = tmp_path / "dense.log"
    handler._counts = {"dense": 1}
    begin(handler, 1, "dense", log, model="m")
    folder = tmp_path / "locks"
    folder.mkdir()
    first = folder / f"sparsity-atlas-{os.getuid()}-gpu-one.lock"
    held = first.open("a")
    fcntl.flock(held, fcntl.LOCK_EX)
    lines: list[str] = []

    def said(message: str, *arguments: object) -> None:
        lines.append(message % arguments)
        held.close()

    monkeypatch.setattr(devices.logger, "info", said)
    monkeypatch.setattr(devices, "_claimed", [])
    assert devices.claim_gpu(["one"], folder=folder, poll=0.01, shares=1) == 0
    log.write_text("".join(f"{line}\n" for line in lines))
    handler._look(1)
    assert heard == ["hold", "go"]
