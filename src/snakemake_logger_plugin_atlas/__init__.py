"""Snakemake's output in one line a job: what is done, what is left, and how long it will take.

Named by `logger: atlas` in profiles/default. Errors, dry runs and everything else are shown as
Snakemake shows them; the full log stays in .snakemake/log.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter, get_event
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

# Scheduler's chatter, said by the lines below in fewer words.
NOISE = (
    "Select jobs to execute",
    "Execute ",
    "Using workflow specific profile",
    "Assuming unrestricted",
)

# The command of a job that failed; the job's own error, which follows, says more.
ECHO = "RuleException:\nCalledProcessError"


@dataclass
class _Job:
    rule: str
    what: str
    began: float


class Forecast:
    """Estimates the time left from the times of the jobs that have finished.

    Jobs of a rule take what that rule's finished jobs took on average. A rule of which none has
    finished takes what all finished jobs took on average.
    """

    def __init__(self, counts: dict[str, int], now: float) -> None:
        self.left = Counter(counts)
        self.began = now
        self.spent: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()

    def finish(self, rule: str, seconds: float) -> None:
        """A job of `rule` took so long."""
        self.left[rule] -= 1
        self.spent[rule] += seconds
        self.finished[rule] += 1

    def seconds_left(self, now: float) -> float | None:
        """Expected wall time until all is done; None before the first job has finished."""
        jobs = self.finished.total()
        if jobs == 0 or now <= self.began:
            return None
        average = self.spent.total() / jobs
        work = sum(
            count * (self.spent[rule] / self.finished[rule] if self.finished[rule] else average)
            for rule, count in self.left.items()
        )
        # Jobs that ran at once, on average.
        return work / max(self.spent.total() / (now - self.began), 1e-9)


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 7 min, 3.5 h."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _stated_error(logs: list[str]) -> str | None:
    """The one line in which a stage of ours says what is wrong; None if it fell over otherwise."""
    path = Path(logs[0]) if logs else None
    lines = path.read_text(errors="replace").split("\n") if path and path.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("error: ") if last.startswith("error: ") else None


def misplaced(words: list[str]) -> str | None:
    """What a command line gives to --configfile that is none, most often a target behind it.

    Snakemake takes every word up to the next option for a configuration. With `=` it takes one.
    """
    for number, word in enumerate(words):
        option, _, single = word.partition("=")
        if option not in ("--configfile", "--configfiles"):
            continue
        behind = itertools.takewhile(lambda one: not one.startswith("-"), words[number + 1 :])
        given = [single] if single else list(behind)
        for one in given[1:]:
            path = Path(one)
            if path.suffix not in (".yaml", ".yml", ".json") or path.parts[0] == "results":
                return (
                    f"--configfile: '{one}' is no configuration; write --configfile={given[0]}, since "
                    "every word behind the plain option is taken for a file"
                )
        missing = next((one for one in given if not Path(one).is_file()), None)
        if missing is not None:
            return f"--configfile: {missing}: no such file"
    return None


class LogHandler(LogHandlerBase):
    """The handler that Snakemake loads."""

    def __post_init__(self) -> None:
        # Here, since Snakemake reads these files before the Snakefile and ends in a traceback.
        mistake = misplaced(sys.argv)
        if mistake:
            raise SystemExit(f"error: {mistake}")
        settings = self.common_settings
        self._default = ColorizingTextHandler(
            nocolor=settings.nocolor, stream=sys.stdout if settings.stdout else sys.stderr
        )
        self._default.setFormatter(DefaultFormatter(settings.quiet, settings.show_failed_logs))
        self.addFilter(
            DefaultFilter(
                settings.quiet,
                settings.debug_dag,
                settings.verbose,
                settings.dryrun,
                settings.printshellcmds,
            )
        )
        self._jobs: dict[int, _Job] = {}
        self._counts: dict[str, int] = {}
        self._forecast: Forecast | None = None
        self._done = 0

    writes_to_stream = True
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record; see the module's docstring."""
        event = get_event(record)
        if self.common_settings.dryrun or self.common_settings.verbose:
            self._default.handle(record)
        elif event == LogEvent.RUN_INFO:
            stats: dict[str, Any] = record.__dict__.get("stats") or {}
            self._counts = {rule: count for rule, count in stats.items() if rule != "total"}
            self._default.handle(record)
        elif event == LogEvent.JOB_INFO:
            self._begin(record.__dict__)
        elif event == LogEvent.JOB_FINISHED:
            self._finish(record.__dict__["job_id"])
        elif event == LogEvent.JOB_ERROR and (reason := _stated_error(record.__dict__["log"])):
            # Snakemake says the wildcards at a job's start, and not again when it fails.
            job = self._jobs[record.__dict__["jobid"]]
            log = record.__dict__["log"][0]
            self._say(f"{'[failed]':>11} {job.rule} {job.what}: {reason} (log: {log})")
        elif str(record.msg).startswith(ECHO):
            pass
        elif event not in (
            LogEvent.JOB_STARTED,
            LogEvent.PROGRESS,
            LogEvent.RESOURCES_INFO,
        ) and not (event is None and str(record.msg).startswith(NOISE)):
            self._default.handle(record)

    def _begin(self, job: dict[str, Any]) -> None:
        now = time.monotonic()
        self._forecast = self._forecast or Forecast(self._counts, now)
        what = " ".join(str(value) for value in job["wildcards"].values())
        self._jobs[job["jobid"]] = _Job(job["rule_name"], what, now)
        if job["rule_name"] != "all":
            self._say(f"{'':>11} {job['rule_name']} {what} …")

    def _finish(self, jobid: int) -> None:
        job = self._jobs.pop(jobid, None)
        if job is None or self._forecast is None:
            return
        now = time.monotonic()
        self._forecast.finish(job.rule, now - job.began)
        self._done += 1
        total = sum(self._counts.values())
        left = self._forecast.seconds_left(now)
        rest = "" if left is None or self._done == total else f", about {duration(left)} left"
        self._say(
            f"{f'[{self._done}/{total}]':>11} {job.rule} {job.what} done in "
            f"{duration(now - job.began)}{rest}"
        )

    def _say(self, text: str) -> None:
        self._default.stream.write(text + "\n")
        self._default.flush()
