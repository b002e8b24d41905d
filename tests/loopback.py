"""A Slurm of this one machine (slurm.sh), and runs of a working copy through profiles/slurm on it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkout import HOOKS, ROOT, Checkout

SCRIPT = ROOT / "tests/cluster/slurm.sh"

# What differs from a cluster: a local file system, and short waits so that the tests end soon.
LOCAL = ("--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1")
NO_ACCOUNTING = ("--slurm-no-account",)


class Slurm:
    """A running loopback cluster.

    Attributes:
        folder: of its configuration, process ids and logs.
    """

    def __init__(self, folder: Path, plugin: Path, accounting: bool) -> None:
        self.folder = folder
        self._plugin = plugin
        self.accounting = accounting

    def run(self, checkout: Checkout, *arguments: str, **environment: str) -> str:
        """Run the smoke configuration; returns what Snakemake said."""
        process = self.start(checkout, *arguments, **environment)
        try:
            text, _ = process.communicate(timeout=900)
        finally:
            stop(process)
        assert process.returncode == 0, text
        return text

    def start(
        self, checkout: Checkout, *arguments: str, **environment: str
    ) -> subprocess.Popen[str]:
        """Start such a run, in a session of its own; without FORK_SERVER its jobs are real ones."""
        command = [sys.executable, "-m", "snakemake", "--nocolor"]
        command += ["--workflow-profile", "profiles/slurm", *LOCAL]
        command += [] if self.accounting else NO_ACCOUNTING
        # Last, since it takes whatever follows it.
        command += [*arguments, "--configfile", "workflow/config/smoke.yaml"]
        path = os.pathsep.join(map(str, (checkout.path / "src", HOOKS, self._plugin)))
        return subprocess.Popen(
            command,
            cwd=checkout.path,
            env=checkout.environment(
                PYTHONPATH=path, **{"FORK_SERVER": "", "STATUS_SECONDS": "1", **environment}
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def jobs(self, *fields: str) -> list[dict[str, str]]:
        """Every job, the first one first: fields of `squeue --Format`, rule and wildcards."""
        widths = ",".join(f"{field}:120" for field in ("Comment", *fields))
        text = call("squeue", "--states=all", "--sort=i", "--noheader", "--Format", widths)
        rows = []
        for line in text.splitlines():
            cells = [line[i : i + 120].strip() for i in range(0, 120 * (len(fields) + 1), 120)]
            rule, _, wildcards = cells[0].removeprefix("rule_").partition("_wildcards_")
            rows.append(
                {"rule": rule, "wildcards": wildcards, **dict(zip(fields, cells[1:], strict=True))}
            )
        return rows

    def pid(self, daemon: str) -> int:
        """Process of slurmctld, slurmd1 or slurmd2."""
        return int((self.folder / f"{daemon}.pid").read_text())


def call(*command: str) -> str:
    """Output of one of Slurm's commands, which wait for ever for a controller that is gone."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stop(process: subprocess.Popen[str]) -> None:
    """End a run and whatever it started here, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)


def need_root() -> None:
    """Skip where nothing can be installed."""
    if os.geteuid() != 0 or not Path("/usr/bin/apt-get").exists():
        pytest.skip(
            "needs root on Debian or Ubuntu: Slurm is installed and its daemons run as root"
        )


def start_cluster(state: Path, *words: str, owner: int) -> subprocess.CompletedProcess[str]:
    """Call slurm.sh, for a process; what it prints is the result's `stdout`."""
    # To a file: daemons that inherit a pipe keep it open.
    log = state.with_suffix(".log")
    with log.open("w") as output:
        done = subprocess.run(
            ["timeout", "--kill-after=5", "240", SCRIPT, "start", state, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "OWNER": str(owner)},
        )
    return subprocess.CompletedProcess(done.args, done.returncode, log.read_text())


def stop_cluster(state: Path) -> None:
    """Stop what `start_cluster` started, if anything."""
    subprocess.run(
        ["timeout", "--kill-after=5", "120", SCRIPT, "stop", state], check=True, timeout=130
    )


@contextlib.contextmanager
def loopback(folder: Path, *, accounting: bool = False) -> Iterator[Slurm]:
    """A cluster, until the end of the block. Skips where nothing can be installed, else insists."""
    need_root()
    plugin = _install_plugin()
    state = folder / "slurm"
    try:
        done = start_cluster(state, *(["accounting"] if accounting else []), owner=os.getpid())
        assert done.returncode == 0, done.stdout
        yield Slurm(state, plugin, accounting)
    finally:
        stop_cluster(state)


@functools.cache
def _install_plugin() -> Path:
    """The `slurm` extra, in a folder of its own: in the environment, every test would import it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["slurm"]
    folder = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
    # --target would bring pandas and numpy again, which the environment has; the job step it has not.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    wanted = [*extra, "snakemake-executor-plugin-slurm-jobstep"]
    subprocess.run([*command, *wanted], check=True, timeout=300)
    return folder


def resources(job: dict[str, str]) -> dict[str, Any]:
    """GPUs and MiB that a job was submitted with."""
    return {
        "gpu": int(job["tres-per-job"].removeprefix("gres:gpu:").replace("N/A", "0")),
        "mem": int(job["MinMemory"].removesuffix("M")),
    }
