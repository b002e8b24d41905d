"""A working copy of the project in a temporary folder, where Snakemake runs as a user runs it.

Snakemake and its jobs are forked from a server that has imported the libraries and nothing of this project
(`hooks/fork_server.py`): each sees the working copy's own source files and costs no start.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock

import forks
from hooks.forking import Forked

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "config.yaml", "workflow", "profiles", "src", "envs")
HOOKS = Path(__file__).parent / "hooks"
ZOO = Path("workflow/resources/zoo")

# What Snakemake and the stages import, but for this project; apart what reads, when it is imported, where
# the Hub is.
LIBRARIES = (
    *("snakemake.cli", "pandas", "pydantic", "pyarrow.parquet", "zarr", "scipy.stats", "seaborn"),
    *("jinja2", "torch", "compiled", "safetensors.torch", "snakemake.report.html_reporter"),
    *("snakemake.benchmark", "snakemake.profiles", "snakemake.storage", "smart_open", "scipy.io"),
    *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "plugins"),
)
HUB_LIBRARIES = (
    *("datasets", "lm_eval.tasks", "lm_eval.evaluator", "lm_eval.models.huggingface"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.modeling_llama", "converted"),
)

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


def fork_server() -> str:
    """The socket of the server of these tests. No model is to be had where its forks look for one."""
    return _fork_servers()[1]


def hub_fork_server() -> str:
    """That of the one whose forks may have a Hub each."""
    return _fork_servers()[0]


def _fork_servers() -> list[str]:
    """Those of this process, or of the one whose worker it is."""
    if "FORK_SERVERS" not in os.environ:
        folder = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
        _started.append(forks.Servers(folder, (LIBRARIES, HUB_LIBRARIES), _offline()))
        os.environ["FORK_SERVERS"] = os.pathsep.join(_started[0].addresses)
    return os.environ["FORK_SERVERS"].split(os.pathsep)


_started: list[forks.Servers] = []


def end_fork_servers() -> None:
    """Those of this process end, if it has any."""
    while _started:
        _started.pop().close()


# In the types of small and of half-precision numbers; what is compiled does not hang on the rule.
COMPILE = """
import torch
from sparsity_atlas.kernels import masked
from sparsity_atlas.kernels.definition import Threshold
for dtype in (torch.float32, torch.bfloat16):
    rows = torch.ones(1, 8, dtype=dtype)
    masked(Threshold("share", 0.5), rows, rows)
"""


@functools.cache
def _compile_kernels() -> None:
    """Have Numba compile its kernels once: each working copy would take a quarter of a minute for them."""
    with FileLock(Path(os.environ["XDG_CACHE_HOME"], "kernels.lock")):
        done = forks.run("-c", COMPILE, **Checkout(ROOT).forked())
    assert done.returncode == 0, done.stdout


def _offline() -> dict[str, str]:
    """Environment of all that is run: one thread, no network, a cache of these tests' own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Many processes compile the same files.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


class Checkout:
    """A working copy at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "results"

    @classmethod
    def make(cls, path: Path, source: Path = ROOT) -> Checkout:
        """A fresh copy of the sources, with the smallest model of the zoo only (for speed)."""
        if source == ROOT:
            _compile_kernels()
        path.mkdir(parents=True)

        def ignore(folder: str, names: list[str]) -> set[str]:
            # What is compiled comes along, but for what somebody is just writing.
            compiled = (".pyc", ".nbi", ".nbc")
            skipped = {name for name in names if name.endswith(".egg-info")}
            if Path(folder).name == "__pycache__":
                skipped |= {name for name in names if not name.endswith(compiled)}
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
        done = self._python("-m", "snakemake", "--dry-run", "--nocolor", *arguments)
        return Planned(done.returncode, done.stdout, _planned_jobs(done.stdout))

    def run(
        self, *arguments: str, config: dict[str, Any] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake on the smoke configuration, or on another one, in a session of its own."""
        command = ["-m", "snakemake", "--cores", "2", "--nocolor"]
        return self._python(*command, *self._arguments(config, arguments), **environment)

    def stage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the one command, its output apart from its errors."""
        return self._python("-m", "sparsity_atlas", *arguments, merged=False)

    def _python(
        self, *arguments: str, merged: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return forks.run(*arguments, merged=merged, **self.forked(**environment))

    def start(self, *arguments: str, log: Path = Path(os.devnull), **environment: str) -> Forked:
        """Start Python with these arguments, as the head of a process group of its own."""
        with open(os.devnull) as nothing, log.open("w") as file:
            streams = nothing.fileno(), file.fileno(), file.fileno()
            return Forked(arguments=arguments, streams=streams, **self.forked(**environment))

    def forked(self, **environment: str) -> dict[str, Any]:
        """What `Forked` needs to know of processes in this copy."""
        env = self.environment(**environment)
        return {"server": fork_server(), "cwd": self.path, "env": env}

    def run_well(self, *arguments: str, config: dict[str, Any] | None = None) -> list[str]:
        """Run, insist on success, and return the forward passes that it took."""
        self.forget_forwards()
        done = self.run(*arguments, config=config)
        assert done.returncode == 0, done.stdout
        return self.forwards()

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a run: this copy's source, no network.

        With FORK_SERVER="" its stages are processes of their own, children of Snakemake's.
        """
        return {
            **_offline(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # This package, as if installed, where a copy has none.
            "PYTHONPATH": os.pathsep.join(map(str, (self.path / "src", HOOKS, ROOT / "src"))),
            "FORK_SERVER": fork_server(),
            # A worker would outlive a test; those of test_shared_model.py turn it on.
            "SPARSITY_ATLAS_WORKER": "off",
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


def shared(folder: Path, make: Callable[[Path], None]) -> Checkout:
    """A run below `folder` that the first who asks for it makes. Others wait; nobody may change it."""
    with FileLock(f"{folder}.lock"):
        checkout = Checkout(folder / "atlas")
        if not (folder / "made").exists():
            make(checkout.path)
            (folder / "made").touch()
        return checkout
