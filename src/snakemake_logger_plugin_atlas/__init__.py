"""Snakemake's output in one line a job: what is done, what is left, and how long it will take.

Named by `logger: atlas` in profiles/default. Errors, dry runs and everything else are shown as
Snakemake shows them; the full log stays in .snakemake/log.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter, get_event
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from sparsity_atlas import progress
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.mapping_file import check_file
from sparsity_atlas.plan.corrections import Seconds
from sparsity_atlas.plan.schedule import Key
from sparsity_atlas.plan.time_left import TimeLeft

# Scheduler's chatter, said by the lines below in fewer words.
NOISE = (
    "Select jobs to execute",
    "Execute ",
    "Using workflow specific profile",
    "Assuming unrestricted",
)

# What a Snakefile reads by itself, in a checkout and where the workflow was deployed.
OWN_CONFIGURATIONS = {"Snakefile": "config.yaml", "workflow/Snakefile": "config/config.yaml"}

# The command of a job that failed; the job's own error, which follows, says more.
ECHO = "RuleException:\nCalledProcessError"


# What a search says of each level as it ends (`sparsity_atlas.evaluation.search`).
LEVEL = re.compile(r"level \S+: .*; took \d+ s, (?:at most \d+ more.*|the last)$")
# And a job that waits for a GPU (`sparsity_atlas.loading.devices`), and when it waits no longer.
HELD, FREE = re.compile(r"all \d+ GPUs are in use by other jobs; waiting"), "a GPU is free"
POLL = 1.0
# Seconds after which something is said again, and the same as a share of the run so far.
SILENCE, OF_RUN = 15.0, 0.05
# Jobs that are named then.
FEW = 3

# What the Snakefile expects of its jobs: called once, when the jobs of a run are known.
_expected: Callable[[], Expected] | None = None

# Seconds by job, as `expected_seconds.expected` gives them, and how many run at once, as `at_once` does.
Expected = tuple[list[tuple[Key, Seconds]], tuple[int, int]]


def expect(jobs: Callable[[], Expected]) -> None:
    """Say what the jobs of this process's workflow are expected to take.

    Args:
        jobs: gives it.
    """
    global _expected
    _expected = jobs


def _forecast() -> Expected:
    """What is expected of the jobs; nothing where files stand in the way, of which a job will say more."""
    try:
        return _expected() if _expected else ([], (1, 1))
    except (AtlasError, OSError):
        return [], (1, 1)


@dataclass
class _Job:
    rule: str
    what: str
    began: float
    log: Path | None
    said: int = 0  # bytes of the log that were looked at


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 2.5 min, 17 min, 3.5 h."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 570:
        # A whole minute would be off by a quarter of two.
        return f"{seconds / 60:.1f} min"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _stated_error(logs: list[str]) -> str | None:
    """The one line in which a stage of ours says what is wrong; None if it fell over otherwise."""
    path = Path(logs[0]) if logs else None
    lines = path.read_text(errors="replace").split("\n") if path and path.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("error: ") if last.startswith("error: ") else None


def _size(path: Path | None) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path is not None and path.is_file() else 0


def misread(words: list[str]) -> str | None:
    """What is wrong with the files that a command line names, and with the workflow's own configuration."""
    own = [path for entry, path in OWN_CONFIGURATIONS.items() if Path(entry).is_file()]
    try:
        for path in map(Path, (*own, *itertools.chain(*_given(words)))):
            if path.is_file():
                check_file(path)
    except AtlasError as error:
        return str(error)
    return None


def _given(words: list[str]) -> Iterator[list[str]]:
    """What stands behind each --configfile."""
    for number, word in enumerate(words):
        option, _, single = word.partition("=")
        if option in ("--configfile", "--configfiles"):
            behind = itertools.takewhile(lambda one: not one.startswith("-"), words[number + 1 :])
            yield [single] if single else list(behind)


def misplaced(words: list[str]) -> str | None:
    """What a command line gives to --configfile that is none, most often a target behind it.

    Snakemake takes every word up to the next option for a configuration. With `=` it takes one.
    """
    for given in _given(words):
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
        mistake = misplaced(sys.argv) or misread(sys.argv)
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
        self._time: TimeLeft | None = None
        self._done = 0
        self._began = self._spoke = time.monotonic()
        # Records come from Snakemake's thread, levels from one of our own.
        self._state = threading.RLock()
        self._stopped = threading.Event()

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

    def close(self) -> None:
        """Stop looking at logs."""
        self._stopped.set()
        super().close()

    def _begin(self, job: dict[str, Any]) -> None:
        now = time.monotonic()
        rule, wildcards = job["rule_name"], dict(job["wildcards"].items())
        log = Path(job["log"][0]) if job["log"] else None
        with self._state:
            if self._time is None:
                self._time = TimeLeft(self._counts, *_forecast())
                threading.Thread(target=self._watch, daemon=True).start()
            what = " ".join(str(value) for value in wildcards.values())
            # What an earlier try left in the log is none of this one's.
            self._jobs[job["jobid"]] = _Job(rule, what, now, log, _size(log))
            names = ("model", "criterion", "site", "task")
            self._time.begin(
                job["jobid"], Key(rule, **{n: wildcards.get(n, "") for n in names}), now
            )
            if rule != "all":
                self._say(f"{'':>11} {rule} {what} …")

    def _finish(self, jobid: int) -> None:
        with self._state:
            self._look(jobid)
            job = self._jobs.pop(jobid, None)
            if job is None or self._time is None:
                return
            now = time.monotonic()
            self._time.finish(jobid, now)
            self._done += 1
            total = sum(self._counts.values())
            rest = "" if self._done == total else self._rest(now)
            self._say(
                f"{f'[{self._done}/{total}]':>11} {job.rule} {job.what} done in "
                f"{duration(now - job.began)}{rest}"
            )

    def _rest(self, now: float) -> str:
        left = self._time.seconds_left(now) if self._time else None
        return "" if left is None else f", about {duration(left)} left"

    def _watch(self) -> None:
        """Say what jobs do while they run: a job's own output goes into its log."""
        while not self._stopped.wait(POLL):
            with self._state:
                for jobid in list(self._jobs):
                    self._look(jobid)
                now = time.monotonic()
                if now - self._spoke > max(SILENCE, OF_RUN * (now - self._began)):
                    names = [f"{job.rule} {job.what}".strip() for job in self._jobs.values()]
                    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
                    text = f"{', '.join(names[:FEW])}{more}"
                    if rest := self._rest(now):
                        self._say(f"{'':>11} {text} …{rest}")

    def _look(self, jobid: int) -> None:
        """See what a job has said since the last look, and show the levels that a search has ended."""
        job = self._jobs.get(jobid)
        if job is None or job.log is None or self._time is None:
            return
        if _size(job.log) < job.said:
            job.said = 0  # begun anew
        if _size(job.log) == job.said:
            return
        with job.log.open("rb") as file:
            file.seek(job.said)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        job.said += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            now = time.monotonic()
            if done := progress.read(line):
                self._time.reach(jobid, *done, now)
            elif HELD.match(line):
                self._time.hold(jobid, now)
            elif line == FREE:
                self._time.go(jobid, now)
            elif job.rule == "search" and LEVEL.match(line):
                self._say(f"{'':>11} {job.rule} {job.what}: {line}{self._rest(now)}")

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._default.stream.write(text + "\n")
        self._default.flush()
