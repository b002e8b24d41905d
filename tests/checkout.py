"""A working copy of the project in a temporary folder, where Snakemake runs as a user runs it.

Dry runs are forked from a server that has imported Snakemake and nothing of this project, so that each
sees the working copy's own source files and costs no start. Real runs are processes of their own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "config.yaml", "workflow", "profiles", "src", "envs")
HOOKS = Path(__file__).parent / "workflow" / "hooks"
ZOO = Path("workflow/resources/zoo")

_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(["snakemake.cli", "pandas"])

# Of a run's files, those that say when and how it ran.
_NO_RESULTS = re.compile(r"(logs|benchmarks)/.*|.*\.lock")


@dataclass(frozen=True)
class Planned:
    """What a dry run said.

    Attributes:
        returncode: exit code.
        text: standard output and error.
        jobs: "rule path" of each job that would run, the path being its first output below results/.
    """

    returncode: int
    text: str
    jobs: frozenset[str]

    @property
    def counts(self) -> dict[str, int]:
        """Jobs by rule."""
        return dict(Counter(job.split(" ")[0] for job in self.jobs))

    def of(self, *rules: str) -> set[str]:
        """The jobs of some rules."""
        return {job for job in self.jobs if job.split(" ")[0] in rules}


_JOB = re.compile(r"^(?:local)?rule (\w+):\n((?: {4}.*\n)*)", re.MULTILINE)
_OUTPUT = re.compile(r"^ {4}output: ([^,\n]+)", re.MULTILINE)


def _planned_jobs(text: str) -> frozenset[str]:
    jobs = set()
    for rule, body in _JOB.findall(text):
        output = _OUTPUT.search(body)
        jobs.add(f"{rule} {output[1].removeprefix('results/')}" if output else rule)
    return frozenset(jobs)


def _snakemake(arguments: list[str], folder: str, log: str) -> None:
    """Body of a forked dry run."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path.insert(0, f"{folder}/src")
    from snakemake.cli import main

    main(arguments)


class Checkout:
    """A working copy at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "results"

    @classmethod
    def make(cls, path: Path, source: Path = ROOT) -> Checkout:
        """A fresh copy of the sources, with the smallest model of the zoo only (for speed)."""
        path.mkdir(parents=True)

        def ignore(folder: str, names: list[str]) -> set[str]:
            skipped = {
                name for name in names if name == "__pycache__" or name.endswith(".egg-info")
            }
            if Path(folder) == source / ZOO:
                skipped |= set(names) - {"small"}
            return skipped

        for name in PARTS:
            if (source / name).is_dir():
                shutil.copytree(source / name, path / name, ignore=ignore)
            else:
                shutil.copy2(source / name, path / name)
        return cls(path)

    def copy(self, path: Path, *, state: bool = True) -> Checkout:
        """A fresh copy of the sources with these results, and with Snakemake's state unless told."""
        new = Checkout.make(path, self.path)
        names = ["results", "models", ".snakemake"] if state else ["results", "models"]
        for name in names:
            if (self.path / name).exists():
                shutil.copytree(self.path / name, path / name)
        return new

    def _arguments(self, config: dict[str, Any] | None, arguments: tuple[str, ...]) -> list[str]:
        name = "workflow/config/smoke.yaml"
        if config is not None:
            name = "variant.yaml"
            (self.path / name).write_text(yaml.safe_dump(config, sort_keys=False))
        return [*arguments, "--configfile", name]

    def plan(self, *arguments: str, config: dict[str, Any] | None = None) -> Planned:
        """Dry run of the smoke configuration, or of another one."""
        if "--configfile" not in arguments:
            arguments = tuple(self._arguments(config, arguments))
        return self.dry_run(*arguments)

    def dry_run(self, *arguments: str) -> Planned:
        """Dry run with these arguments alone."""
        log = self.path / "plan.log"
        given = ["--dry-run", "--nocolor", *arguments]
        process = _servers.Process(target=_snakemake, args=(given, str(self.path), str(log)))
        process.start()
        process.join()
        text = log.read_text()
        return Planned(process.exitcode or 0, text, _planned_jobs(text))

    def run(
        self, *arguments: str, config: dict[str, Any] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake on the smoke configuration, or on another one, in a session of its own."""
        command = ["snakemake", "--cores", "2", "--nocolor"]
        return subprocess.run(
            [sys.executable, "-m", *command, *self._arguments(config, arguments)],
            cwd=self.path,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            timeout=600,
        )

    def run_well(self, *arguments: str, config: dict[str, Any] | None = None) -> list[str]:
        """Run, insist on success, and return the forward passes that it took."""
        self.forget_forwards()
        done = self.run(*arguments, config=config)
        assert done.returncode == 0, done.stdout
        return self.forwards()

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a run: this copy's source, no network, caches of its own."""
        caches = self.path / "caches"
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{self.path / 'src'}{os.pathsep}{HOOKS}",
            "HF_HUB_OFFLINE": "1",
            # A worker would outlive a test; those of test_shared_model.py turn it on.
            "SPARSITY_ATLAS_WORKER": "off",
            "HF_HOME": str(caches),
            "FORWARD_LOG": str(self.path / "forwards.log"),
            **more,
        }

    def forwards(self) -> list[str]:
        """ "stage output" of every forward pass since `forget_forwards`, in order."""
        log = self.path / "forwards.log"
        return log.read_text().splitlines() if log.exists() else []

    def forget_forwards(self) -> None:
        """Count forward passes from here on."""
        (self.path / "forwards.log").unlink(missing_ok=True)

    @contextlib.contextmanager
    def edited(self, name: str, old: str = "", new: str = "") -> Iterator[None]:
        """Replace text in a file, or append to it when `old` is empty, and put it back at the end."""
        path = self.path / name
        before = path.read_text(encoding="utf-8")
        assert old in before
        path.write_text(before.replace(old, new) if old else before + new, encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(before, encoding="utf-8")

    @contextlib.contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Move files or folders below results/ away, and back at the end."""
        away = self.path / "away"
        for name in names:
            (away / name).parent.mkdir(parents=True, exist_ok=True)
            (self.results / name).rename(away / name)
        try:
            yield
        finally:
            for name in names:
                (away / name).rename(self.results / name)

    def contents(self, folder: str = "") -> dict[str, bytes]:
        """Every result by its path below results/; no logs, benchmarks or locks."""
        start = self.results / folder
        files = (path for path in start.rglob("*") if path.is_file())
        named = ((path.relative_to(self.results).as_posix(), path) for path in files)
        return {name: path.read_bytes() for name, path in named if not _NO_RESULTS.fullmatch(name)}

    def times(self) -> dict[str, int]:
        """Modification time of every file and folder of the results, logs included."""
        return {str(path): path.stat().st_mtime_ns for path in self.results.rglob("*")}

    def add_model(self, name: str) -> Path:
        """A folder models/{name}: the small zoo model with other weights."""
        folder = self.path / "models" / name
        shutil.copytree(self.path / ZOO / "small", folder)
        turn_signs(folder)
        return folder


def change_weights(folder: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change a tensor of a model's bfloat16 weights, given and returned as bits in uint16."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    # The format: eight bytes that say how long the JSON header is, the header, the tensors' bytes.
    data = 8 + int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8:data])[tensor]["data_offsets"]
    bits = np.frombuffer(content[data + start : data + end], dtype="<u2")
    content[data + start : data + end] = change(bits).astype("<u2").tobytes()
    file.write_bytes(content)


def turn_signs(folder: Path) -> None:
    """Change a model: other signs in an FFN's matrix. Done twice, it is as before."""
    change_weights(folder, "model.layers.0.mlp.down_proj.weight", lambda bits: bits ^ 0x8000)


def smoke_config() -> dict[str, Any]:
    """The smoke configuration, to be changed."""
    return copy.deepcopy(_smoke())


@functools.cache
def _smoke() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "workflow/config/smoke.yaml").read_text(encoding="utf-8"))


@functools.cache
def smoke_run(folder: Path) -> Checkout:
    """The smoke configuration, run once a session from an empty folder. Leave it as it is."""
    checkout = Checkout.make(folder / "smoke" / "atlas")
    done = checkout.run()
    assert done.returncode == 0, done.stdout
    return checkout
