"""Settings of all tests; being here, it also puts tests/ (with `tiny_models`) on the path."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import execnet
import pytest

from checkout import HOOKS, Checkout, end_fork_servers, fork_server, shared, smoke_config
from hooks.fork_server import keep_code_in
from longest import LONGEST

# Before transformers is imported: no test may look for a model outside.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Nor may it find there, or leave there, what another run made of a data file or a task.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have those of the process that started them
    _CACHE = tempfile.mkdtemp(prefix="sparsity-atlas-tests-")
    os.environ["HF_DATASETS_CACHE"] = _CACHE
    os.environ["XDG_CACHE_HOME"] = _CACHE
    os.environ["HF_HOME"] = f"{_CACHE}/huggingface"
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    # Before pytest-xdist says the same of its workers, which are forks: what comes later ends earlier.
    atexit.register(end_fork_servers)
    # Images often forbid it: each of many processes would compile the package anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# What models bring as code is copied there and imported, once a process: a folder for each.
keep_code_in(tempfile.mkdtemp(prefix="sparsity-atlas-modules-"))
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
# Before Triton is imported: its interpreter runs the CUDA kernels on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
# Before torch is imported: for tiny tensors, waiting for a second thread takes most of the time.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts its background jobs deaf to Ctrl-C, and what they start; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores: those whose tests wait, for Slurm above all, leave a core free."""
    return len(os.sched_getaffinity(0)) + 2


def pytest_xdist_setupnodes(specs: list[execnet.XSpec]) -> None:
    """Workers are forked where the libraries are imported: else each of them would do it."""
    for spec in specs:
        spec.python = shlex.join(map(str, (sys.executable, HOOKS / "worker.py", fork_server())))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; that a file's tests stay in one process is pytest-xdist's `loadfile`."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get("/".join(item.path.parts[-2:]), len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage meanwhile: libraries and tests stay, and each search among them takes longer."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of these tests have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smoke(common: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run of the smoke configuration, from an empty folder. Leave it as it is."""
    made = shared(common / "smoke", run_smoke)
    own = made.copy(tmp_path_factory.mktemp("smoke") / "atlas")
    shutil.copy2(made.path / "forwards.log", own.path)
    return own


def run_smoke(folder: Path) -> None:
    """Make it."""
    done = Checkout.make(folder).run()
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A working copy in which nothing has run. For dry runs only."""
    return Checkout.make(tmp_path_factory.mktemp("empty") / "atlas")


@pytest.fixture
def config() -> dict[str, Any]:
    """The smoke configuration, to be changed."""
    return smoke_config()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: for tiny tensors, waiting for a second one takes most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
