"""A Hub on the loopback, and stages that are run against it in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import forks
from checkout import ROOT, Checkout, hub_fork_server, shared
from faults import pipeline
from hub_server import HubServer

ZOO = ROOT / "workflow/resources/zoo/small"
# What the fetches of the tests do: resolve a model, and say where it is and what it is.
RESOLVE = """
import json, sys
from sparsity_atlas import cli
from sparsity_atlas.loading.source import resolve
def main():
    checkpoint, commit = resolve(json.loads(sys.argv[1]))
    checkpoint.config()
    files = [path.name for path in checkpoint.weight_files()]
    print(json.dumps({"commit": commit, "weights": files, "digest": checkpoint.digest()}))
cli.run(main)
"""


@dataclass
class Client:
    """Processes that use the Hub, with a cache of their own.

    Attributes:
        home: the cache (HF_HOME).
        more: further environment variables.
    """

    hub: HubServer
    home: Path
    more: dict[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments; nothing can be typed into it."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING_FACE"))
        }
        environment = {
            **kept,
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **self.more,
            **more,
        }
        server = hub_fork_server()
        return forks.run(*command, merged=False, server=server, cwd=self.home, env=environment)

    def stage(self, name: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a stage."""
        return self.run("-m", "sparsity_atlas", name, *arguments, **more)

    def resolve(self, hub: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Fetch a model; keywords in capitals are environment variables."""
        variables = {key: value for key, value in more.items() if key.isupper()}
        source = {"hub": hub, **{key: value for key, value in more.items() if not key.isupper()}}
        return self.run("-c", RESOLVE, json.dumps(source), **variables)

    def resolved(self, hub: str, **more: Any) -> dict[str, Any]:
        """Fetch a model, insist on success, and return what was found."""
        done = self.resolve(hub, **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def refused(self, hub: str, **more: Any) -> str:
        """Fetch a model, insist on one line, and return it."""
        return one_line(self.resolve(hub, **more))


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a process that ended with one, and with nothing else but notes."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.splitlines()[-1:] == errors, done.stderr
    return errors[0]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub without repositories."""
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Its client, with an empty cache."""
    home = tmp_path / "hub"
    home.mkdir()
    return Client(hub, home, {})


@pytest.fixture(scope="session")
def zoo_files() -> dict[str, bytes]:
    """The files of a zoo model."""
    return {path.name: path.read_bytes() for path in ZOO.iterdir() if path.is_file()}


@pytest.fixture(scope="session")
def undisturbed(
    common: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkout, dict[pipeline.Job, float]]:
    """A finished run of every stage on the tiny model, and the seconds that each job took."""
    made = shared(common / "whole", pipeline.run_all)
    own = pipeline.copy(made, tmp_path_factory.mktemp("whole") / "atlas")
    return own, pipeline.seconds(own)


@pytest.fixture(scope="session")
def whole(undisturbed: tuple[Checkout, dict[pipeline.Job, float]]) -> Checkout:
    """That run. Leave it as it is."""
    return undisturbed[0]


@pytest.fixture
def spoilt(whole: Checkout, tmp_path: Path) -> Checkout:
    """A copy of that run, to be spoilt."""
    return pipeline.copy(whole, tmp_path / "atlas")
