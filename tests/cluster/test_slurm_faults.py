"""What breaks on a cluster, on a real Slurm: each time a node loses its last batch at most."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkout import Checkout
from loopback import Slurm, loopback, stop

pytestmark = pytest.mark.study

NODE = "zoo-small/topk/intermediate/0.9"
TARGET = f"results/{NODE}/eval.json"
PASS = f"evaluate {NODE}/eval.json"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The node, run on this machine without Slurm. Leave it as it is."""
    checkout = Checkout.make(tmp_path_factory.mktemp("local") / "atlas")
    checkout.run_well(TARGET)
    return checkout


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "accounting"])
def slurm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Slurm]:
    """A cluster without and with accounting."""
    with loopback(tmp_path_factory.mktemp("cluster"), accounting=request.param) as running:
        yield running


def begin(slurm: Slurm, checkout: Checkout, seconds: int = 5) -> subprocess.Popen[str]:
    """Start a run of the node, each pass of so many seconds, and wait until the first has begun."""
    process = slurm.start(checkout, TARGET, SLOW=str(seconds))
    deadline = time.monotonic() + 300
    while not checkout.forwards():
        if time.monotonic() > deadline or process.poll() is not None:
            stop(process)
            pytest.fail("the node did not begin")
        time.sleep(0.2)
    return process


def end(process: subprocess.Popen[str]) -> str:
    """Wait for a run's good end."""
    try:
        text, _ = process.communicate(timeout=900)
    finally:
        stop(process)
    assert process.returncode == 0, text
    return text


def tries(slurm: Slurm, *fields: str) -> list[dict[str, str]]:
    """The last two submissions of the node, or the one that there is."""
    return [job for job in slurm.jobs("State", *fields) if job["rule"] == "evaluate"][-2:]


def check(checkout: Checkout, alone: Checkout) -> None:
    """The node is what it is anywhere, with one batch repeated at most."""
    assert checkout.contents(NODE) == alone.contents(NODE)
    once = alone.forwards().count(PASS)
    assert once <= checkout.forwards().count(PASS) <= once + 1


def test_a_killed_slurmd(slurm: Slurm, alone: Checkout, tmp_path: Path) -> None:
    """The controller gives the node up after SlurmdTimeout; the job runs on the other one.

    The first try still runs on the dead node, which Slurm cannot reach; the second one waits for its lock.
    """
    checkout = Checkout.make(tmp_path / "atlas")
    process = begin(slurm, checkout, seconds=30)
    (job,) = (one for one in slurm.jobs("State", "NodeList") if one["State"] == "RUNNING")
    os.kill(slurm.pid(f"slurmd{job['NodeList']}"), signal.SIGKILL)
    end(process)
    first, second = tries(slurm, "NodeList")
    assert first["State"] == "NODE_FAIL"
    assert second["State"] == "COMPLETED"
    assert first["NodeList"] != second["NodeList"] or not second["NodeList"]
    check(checkout, alone)
    subprocess.run(["slurmd", "-N", job["NodeList"]], check=True, timeout=20)
    wait_for_nodes()


def test_a_killed_controller(slurm: Slurm, alone: Checkout, tmp_path: Path) -> None:
    """Its jobs run on. Without accounting the executor may then wait for ever, and is started again."""
    checkout = Checkout.make(tmp_path / "atlas")
    process = begin(slurm, checkout)
    os.kill(slurm.pid("slurmctld"), signal.SIGKILL)
    time.sleep(30)
    subprocess.run(["slurmctld"], check=True, timeout=20)
    if slurm.accounting:
        end(process)
    else:
        deadline = time.monotonic() + 300
        while not (checkout.path / TARGET).is_file():
            assert time.monotonic() < deadline, "the node's job did not end"
            time.sleep(0.5)
        stop(process)
        end(slurm.start(checkout, "--unlock"))
        end(slurm.start(checkout, TARGET))
    assert tries(slurm)[-1]["State"] == "COMPLETED"
    check(checkout, alone)


def test_a_killed_snakemake(slurm: Slurm, alone: Checkout, tmp_path: Path) -> None:
    """Its jobs run on. The next run submits the node again, which waits for the first one's lock."""
    checkout = Checkout.make(tmp_path / "atlas")
    stop(begin(slurm, checkout))
    end(slurm.start(checkout, "--unlock"))
    end(slurm.start(checkout, TARGET))
    check(checkout, alone)


def test_too_little_memory(slurm: Slurm, alone: Checkout, tmp_path: Path) -> None:
    checkout = Checkout.make(tmp_path / "atlas")
    given = ("--set-resources", "evaluate:gpu=1", "evaluate:mem_mb=attempt * 600")
    end(slurm.start(checkout, TARGET, *given))
    first, second = tries(slurm, "MinMemory")
    assert (first["MinMemory"], second["MinMemory"]) == ("600M", "1200M")
    assert first["State"] in ("OUT_OF_MEMORY", "CANCELLED", "FAILED")
    assert second["State"] == "COMPLETED"
    check(checkout, alone)


def wait_for_nodes() -> None:
    """Until both nodes take jobs again."""
    for _ in range(100):
        command = ["sinfo", "--noheader", "--Node", "--states=idle"]
        idle = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        if len(idle.splitlines()) == 2:
            return
        time.sleep(0.5)
    pytest.fail("the killed slurmd did not come back")
