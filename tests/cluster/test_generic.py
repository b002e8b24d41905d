"""profiles/cluster-generic with stand-ins for the commands of three schedulers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from checkout import HOOKS, ROOT, Checkout

COMMANDS = ("bsub", "bjobs", "qsub", "qstat", "qacct")
NAMES = {"lsf": "LSF", "pbs": "PBS", "sge": "SGE"}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executor, in a folder of its own: every other test would import it, too."""
    folder = tmp_path_factory.mktemp("plugin")
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["cluster-generic"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*command, *extra], check=True, timeout=300)
    return folder


def profile_of(kind: str) -> dict:
    """The profile with one scheduler's lines in use, as its comments say."""
    text = (ROOT / "profiles/cluster-generic/profile.yaml").read_text()
    blocks = re.split(r"\n(?=# (?:LSF|PBS|SGE|The rest))", text)
    (own,) = (block for block in blocks if block.startswith(f"# {NAMES[kind]}"))
    lines = own.splitlines()[1:]
    used = "\n".join(line if kind == "lsf" else line.removeprefix("# ") for line in lines)
    return yaml.safe_load("\n".join([blocks[0], used, blocks[-1]]))


@pytest.fixture
def stand_in(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with the schedulers' commands; its name is STAND_IN."""
    folder = tmp_path / "scheduler"
    folder.mkdir()
    (folder / "kind").write_text(request.param)
    for command in COMMANDS:
        (folder / command).symlink_to(ROOT / "tests/cluster/scheduler.sh")
    return folder


ASKED = {
    "lsf": r"-J model .* -n 1 .*mem=(\d+)\] .* -M \1 -W 240 -gpu num=0",
    "pbs": r"-N model .*select=1:ncpus=1:ngpus=0:mem=(\d+)mb -l walltime=00:240:00",
    "sge": r"-N model .*-pe smp 1 -l h_vmem=(\d+)M -l h_rt=00:240:00 -l gpu=0",
}


@pytest.mark.parametrize(
    "stand_in",
    ["lsf", *(pytest.param(kind, marks=pytest.mark.study) for kind in ("pbs", "sge"))],
    indirect=True,
)
def test_a_job_is_submitted_and_found(stand_in: Path, plugin: Path, tmp_path: Path) -> None:
    kind = (stand_in / "kind").read_text()
    checkout = Checkout.make(tmp_path / "atlas")
    profile = {**profile_of(kind), "latency-wait": 5}
    (checkout.path / "profiles/cluster-generic/profile.yaml").write_text(yaml.safe_dump(profile))
    done = checkout.run(
        *("--workflow-profile", "profiles/cluster-generic", "results/zoo-small/model.json"),
        PATH=os.pathsep.join([str(stand_in), checkout.environment()["PATH"]]),
        PYTHONPATH=os.pathsep.join(map(str, (checkout.path / "src", HOOKS, plugin))),
        STAND_IN=str(stand_in),
        STATUS_SECONDS="1",
    )
    assert done.returncode == 0, done.stdout
    assert (checkout.results / "zoo-small/model.json").is_file()
    (submission,) = (stand_in / "submissions").read_text().splitlines()
    asked = re.search(ASKED[kind], submission)
    assert asked, submission
    assert int(asked[1]) > 1000


@pytest.mark.parametrize("stand_in", NAMES, indirect=True)
@pytest.mark.parametrize(("code", "status"), [("", "running"), ("0", "success"), ("3", "failed")])
def test_the_status_of_a_job(stand_in: Path, code: str, status: str) -> None:
    kind = (stand_in / "kind").read_text()
    if code:
        (stand_in / "7.code").write_text(code)
    printed = {
        "lsf": "Job <7> is submitted to default queue <normal>.",
        "pbs": "7.server",
        "sge": "7",
    }
    done = subprocess.run(
        [ROOT / "profiles/cluster-generic/status.sh", kind, printed[kind]],
        env={"PATH": f"{stand_in}{os.pathsep}{os.environ['PATH']}", "STAND_IN": str(stand_in)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == (f"{status}\n", 0), done.stderr


def test_a_job_that_the_scheduler_does_not_know_has_failed(tmp_path: Path) -> None:
    for command in ("bjobs", "qstat"):
        (tmp_path / command).write_text("#!/bin/sh\nexit 255\n")
        (tmp_path / command).chmod(0o755)
    for kind in ("lsf", "pbs"):
        done = subprocess.run(
            [ROOT / "profiles/cluster-generic/status.sh", kind, "7"],
            env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "failed\n"
