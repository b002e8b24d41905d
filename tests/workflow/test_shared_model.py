"""Sibling nodes share a loaded model, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkout import Checkout, smoke_config, turn_signs

LEVELS = ["0.9", "0.8", "0.7", "0.5"]
NODES = [f"zoo-small/topk/intermediate/{level}" for level in LEVELS]
TARGETS = [f"results/{node}/eval.json" for node in NODES]


def listed() -> dict[str, Any]:
    """A sweep of four listed levels."""
    config = smoke_config()
    config["run"] = [
        {
            "models": ["zoo-small"],
            "criteria": ["topk"],
            "sites": ["intermediate"],
            "levels": [float(level) for level in LEVELS],
            "tasks": ["few_pairs"],
        }
    ]
    return config


@pytest.fixture
def private() -> Iterator[str]:
    """A folder for the workers of one test; a socket's path must be short."""
    folder = tempfile.mkdtemp()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(smoke: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The sweep, each node in a process of its own. Leave it as it is."""
    checkout = smoke.copy(tmp_path_factory.mktemp("alone") / "atlas")
    shutil.rmtree(checkout.results / "zoo-small/topk")
    done = checkout.run(*TARGETS, config=listed())
    assert done.returncode == 0, done.stdout
    return checkout


@pytest.fixture
def checkout(smoke: Checkout, tmp_path: Path) -> Checkout:
    """The smoke run; the sweep is still to be made."""
    copied = smoke.copy(tmp_path / "atlas")
    shutil.rmtree(copied.results / "zoo-small/topk")
    return copied


def run(checkout: Checkout, folder: str, *arguments: str, **environment: str) -> str:
    done = checkout.run(
        *TARGETS,
        *arguments,
        config=listed(),
        SPARSITY_ATLAS_WORKER="on",
        TMPDIR=folder,
        LOAD_LOG=f"{folder}/loads",
        **environment,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def loads(folder: str) -> list[str]:
    log = Path(folder, "loads")
    return log.read_text().splitlines() if log.exists() else []


def assert_same(checkout: Checkout, alone: Checkout) -> None:
    for node in NODES:
        assert checkout.contents(node) == alone.contents(node)


def test_one_load_serves_all_nodes(checkout: Checkout, alone: Checkout, private: str) -> None:
    run(checkout, private, "--cores", "1")
    assert loads(private) == ["worker"]
    assert_same(checkout, alone)
    for node in NODES:
        log = (checkout.results / "logs" / node / "eval.log").read_text()
        # What the worker logs of a node stands in that node's log.
        assert log.count("few_pairs: acc,none") == 1
        (line,) = (checkout.results / "benchmarks" / node / "eval.jsonl").read_text().splitlines()
        assert json.loads(line)["s"] > 0


def test_two_nodes_at_once_have_a_worker_each(
    checkout: Checkout, alone: Checkout, private: str
) -> None:
    run(checkout, private, "--cores", "2")
    assert loads(private) in (["worker"], ["worker", "worker"])
    assert_same(checkout, alone)


def test_a_worker_killed_inside_a_batch_is_replaced(
    checkout: Checkout, alone: Checkout, private: str
) -> None:
    """Each worker dies at its third pass; the next one goes on with the batch that was cut."""
    before = len(alone.forwards())
    checkout.forget_forwards()
    run(checkout, private, "--cores", "1", KILL="worker:3")
    deaths = len(loads(private)) - 1
    assert deaths >= len(LEVELS) // 2
    assert len(checkout.forwards()) == before + deaths
    assert_same(checkout, alone)


def test_a_worker_ends_with_the_client_that_was_killed(
    checkout: Checkout, alone: Checkout, private: str
) -> None:
    checkout.plan(config=listed())  # writes variant.yaml
    checkout.forget_forwards()
    first = checkout.start(
        *("-m", "snakemake", "--cores", "1", *TARGETS, "--configfile", "variant.yaml"),
        **{"SPARSITY_ATLAS_WORKER": "on", "TMPDIR": private, "SLOW": "1", "FORK_SERVER": ""},
    )
    while not checkout.forwards():
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(1.5)  # a pass takes a second
    cut = len(checkout.forwards())
    time.sleep(2.5)
    assert len(checkout.forwards()) == cut
    assert checkout.run("--unlock", config=listed()).returncode == 0
    run(checkout, private, "--cores", "1")
    assert_same(checkout, alone)


def test_what_changed_since_the_worker_loaded_it_is_loaded_anew(
    checkout: Checkout, private: str
) -> None:
    """Other weights, then other documents, while the worker of the run before waits."""
    tasks = checkout.path / "workflow/resources/tasks/agreement_distant.jsonl"
    model = checkout.path / "workflow/resources/zoo/small"
    run(checkout, private, "--cores", "1")
    seen = [checkout.contents("zoo-small/topk")]
    for change in (lambda: turn_signs(model), lambda: _reverse(tasks)):
        change()
        run(checkout, private, "--cores", "1")
        seen.append(checkout.contents("zoo-small/topk"))
    assert loads(private).count("worker") == 3
    fresh = checkout.copy(checkout.path.parent / "fresh", state=False)
    for folder in ("zoo-small/topk", "zoo-small/dense"):
        shutil.rmtree(fresh.results / folder, ignore_errors=True)
    done = fresh.run(*TARGETS, config=listed())
    assert done.returncode == 0, done.stdout
    assert fresh.contents("zoo-small/topk") == seen[-1]
    assert len({json.dumps(sorted(map(repr, one.items()))) for one in seen}) == 3


def _reverse(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))


def test_an_error_in_the_worker_is_the_jobs_own(checkout: Checkout, private: str) -> None:
    config = listed()
    config["run"][0]["sites"] = ["intermediate"]
    config["models"] = {"zoo-small": {"apply_chat_template": True}}
    done = checkout.run(
        TARGETS[0],
        config=config,
        **{"SPARSITY_ATLAS_WORKER": "on", "TMPDIR": private},
    )
    assert done.returncode != 0
    log = (checkout.results / "logs" / NODES[0] / "eval.log").read_text()
    (line,) = [one for one in log.splitlines() if one.startswith("error: ")]
    assert "apply_chat_template" in line
