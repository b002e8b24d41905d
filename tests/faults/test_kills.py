"""Killed at any moment, a stage leaves nothing half made, and the next run ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from checkout import Checkout
from faults import pipeline
from faults.pipeline import Job
from sparsity_atlas.upkeep.doctor import examine

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Bench:
    """A working copy on which stages are killed, and the undisturbed run that it must equal.

    Attributes:
        jobs: of the workflow, with the seconds that each takes undisturbed.
        told: what became of each kill.
    """

    checkout: Checkout
    whole: dict[str, bytes]
    jobs: dict[Job, float]
    told: dict[str, int] = field(default_factory=dict)

    def kill(self, job: Job, moment: float, number: signal.Signals) -> None:
        """Start a job and send it a signal when this share of its usual time is over."""
        # A SIGKILL before may have left some, which are swept when their file is written again.
        temporary = set(self.checkout.results.rglob(".*.tmp"))
        process = pipeline.start(self.checkout, job, SLOW=pipeline.SLOW)
        time.sleep(moment * self.jobs[job])
        os.killpg(process.pid, number)
        process.wait(timeout=300)
        left = set(self.checkout.results.rglob(".*.tmp")) - temporary
        self._look_at_what_is_left(job, process.returncode, number, left)

    def _look_at_what_is_left(
        self, job: Job, code: int, number: signal.Signals, temporary: set[Path]
    ) -> None:
        log = pipeline.log_of(self.checkout, job)
        stopped = [line for line in log.splitlines() if line.startswith("error: stopped by ")]
        if code == 0:
            end = "was done before"
            assert all((self.checkout.path / output).is_file() for output in job.outputs)
        elif stopped:
            end = "ended in one line"
            assert code == 128 + number
            assert log.splitlines()[-1] == f"{stopped[0]}"
            assert not temporary
        else:
            # SIGKILL; or before the stage's own code had begun, or when it had ended.
            end = "died at once"
            assert code == -number or "KeyboardInterrupt" in log, log
        key = f"{number.name}: {end}"
        self.told[key] = self.told.get(key, 0) + 1
        damaged = [one for one in examine(self.checkout.results) if one.problem]
        assert [one for one in damaged if "is not there" not in one.problem] == []
        for name, content in self.checkout.contents().items():
            if name in self.whole and f"results/{name}" in job.outputs:
                assert content == self.whole[name], name

    def finish(self, job: Job) -> None:
        """The next run ends with the bytes of the undisturbed one, and leaves nothing behind."""
        assert pipeline.run(self.checkout, job) == 0, pipeline.log_of(self.checkout, job)
        found = self.checkout.contents()
        assert found.keys() == self.whole.keys()
        assert [name for name in found if found[name] != self.whole[name]] == []

    def without(self, job: Job) -> None:
        """Take away all that a job makes."""
        for path in products(self.checkout, job):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def products(checkout: Checkout, job: Job) -> list[Path]:
    """The files and folders that a job makes, also those that are no outputs."""
    results = checkout.results
    outputs = [checkout.path / output for output in job.outputs]
    match job.rule:
        case "capture":
            return [results / "tiny/activations.zarr", *outputs]
        case "dense" | "evaluate":
            return [outputs[0].parent]
        case "search":
            return [*outputs, *(path.parent for path in outputs[0].parent.glob("*/eval.json"))]
    return outputs


@pytest.fixture(scope="module")
def bench(
    undisturbed: tuple[Checkout, dict[Job, float]], tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    """A copy of the finished run."""
    whole, seconds = undisturbed
    checkout = pipeline.copy(whole, tmp_path_factory.mktemp("kills") / "atlas")
    return Bench(checkout, whole.contents(), seconds)


def trial(bench: Bench, job: Job, kills: int, seed: str) -> None:
    """Kill a job so many times, then let it finish."""
    draw = random.Random(seed)
    bench.without(job)
    for _ in range(kills):
        bench.kill(job, draw.uniform(0.2, 1.0), SIGNALS[sum(bench.told.values()) % 3])
    bench.finish(job)


def test_stages_killed(bench: Bench) -> None:
    """Every job once, and twice those that work for long."""
    kills = 0
    for job in bench.jobs:
        long = ("capture", "dense", "evaluate", "search", "sensitivity", "tables")
        count = 2 if job.rule in long else 1
        trial(bench, job, count, f"short {job}")
        kills += count
    assert kills == sum(bench.told.values()) == 22
    print(kills, bench.told)  # noqa: T201


@pytest.mark.study
def test_stages_killed_two_hundred_times(bench: Bench) -> None:
    """Every job is killed in turn, up to four times before it may finish."""
    round_ = 0
    # Those that came when a process had ended do not count.
    while sum(n for end, n in bench.told.items() if not end.endswith("was done before")) < 200:
        for job in bench.jobs:
            trial(
                bench, job, random.Random(f"{round_} {job}").randint(1, 4), f"long {round_} {job}"
            )
        round_ += 1
        print(sum(bench.told.values()), bench.told, flush=True)  # noqa: T201


STOPPED_IN_A_DESTRUCTOR = """
import os, signal, sys
from pathlib import Path
from sparsity_atlas import cli
from sparsity_atlas.files.whole import write_atomically

class Foreign:
    def __del__(self):  # what is raised here, Python drops
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        sum(range(100))

def write(path):
    path.write_text("half of it")
    foreign = Foreign()
    del foreign
    path.write_text("all of it")

cli.run(lambda: write_atomically(Path(sys.argv[1]), write))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_where_no_exception_gets_through(tmp_path: Path, number: signal.Signals) -> None:
    """In a library's own code an exception is lost, or aborts the process; the stage ends all the same."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_IN_A_DESTRUCTOR, tmp_path / "result", number.name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number
    assert done.stderr == f"error: stopped by {number.name}; the same command goes on from here\n"
    assert list(tmp_path.iterdir()) == []


# Snakemake itself


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_snakemake_killed(
    spoilt: Checkout, whole: Checkout, bench: Bench, number: signal.Signals
) -> None:
    """With all its jobs, by a closed terminal or by Ctrl-C; the next run makes what is missing."""
    rules = ("capture", "evaluate", "search")
    jobs = [job for job in bench.jobs if job.rule in rules]
    spoiling = Bench(spoilt, bench.whole, bench.jobs)
    for job in jobs:
        spoiling.without(job)
    targets = [job.outputs[0] for job in jobs]
    config = pipeline.configuration()
    assert {job.split()[0] for job in spoilt.plan(*targets, config=config).jobs} == set(rules)
    log = spoilt.results / "logs/tiny/topp/intermediate/search.log"
    log.unlink()
    # Jobs in Snakemake's own group, as at a terminal.
    process = spoilt.start(
        *("-m", "snakemake", "--cores", "2", *targets, "--configfile", "variant.yaml"),
        SLOW=pipeline.SLOW,
        FORK_SERVER="",
    )
    # Snakemake takes seconds to begin; what is of interest begins with its first job.
    while not log.is_file() and process.poll() is None:
        time.sleep(0.05)
    longest = max(bench.jobs[job] for job in jobs)
    time.sleep(random.Random(f"snakemake {number}").uniform(0.1, 1.5) * longest)
    os.killpg(process.pid, number)
    try:
        process.wait(timeout=100)
    except TimeoutError:
        # Snakemake 9.27's handler takes a lock (JobScheduler._lock) that its main thread, which it
        # interrupts, may hold: then it waits for ever. No job of ours does.
        jobs_left = psutil.Process(process.pid).children(recursive=True)
        assert [one for one in jobs_left if one.status() != psutil.STATUS_ZOMBIE] == []
        process.end()
    assert [one for one in examine(spoilt.results) if one.problem and one.delete] == []
    assert spoilt.run("--unlock", config=config).returncode == 0
    done = spoilt.run(*targets, config=config)
    assert done.returncode == 0, done.stdout
    # Outside of it, a run that was stopped leaves a report of what there was.
    assert spoilt.contents("tiny") == whole.contents("tiny")
