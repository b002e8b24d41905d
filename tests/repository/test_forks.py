"""A process that the tests fork ends as one that Python starts does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import forks
from checkout import HOOKS, ROOT
from hooks.forking import Forked

DIE = "import os; os.kill(os.getpid(), {})"


@pytest.fixture(scope="module")
def server() -> Iterator[forks.Server]:
    """A server without libraries; a socket's path must be short."""
    with tempfile.TemporaryDirectory() as folder:
        made = forks.Server(Path(folder), [], os.environ)
        yield made
        made.close()


@pytest.mark.parametrize(
    ("code", "returncode", "said"),
    [
        ("print(1)", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import atexit; atexit.register(print, 'bye')", 0, ""),
        *((DIE.format(number), -number, "") for number in (signal.SIGKILL, signal.SIGTERM)),
        (DIE.format(int(signal.SIGINT)) + "; import time; time.sleep(9)", -2, "KeyboardInterrupt"),
    ],
    ids=str,
)
def test_ends_alike(
    server: forks.Server, tmp_path: Path, code: str, returncode: int, said: str
) -> None:
    forked = forks.run(
        "-c", code, merged=False, server=server.address, cwd=tmp_path, env=dict(os.environ)
    )
    real = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert forked.returncode == real.returncode == returncode
    assert forked.stdout == real.stdout
    assert forked.stderr.rstrip().endswith(said)


@pytest.mark.parametrize("end", [*("SystemExit(0)", "SystemExit(4)"), "SIGKILL", "SIGTERM"])
def test_who_has_its_work_done_ends_as_the_work_did(
    server: forks.Server, tmp_path: Path, end: str
) -> None:
    """And does not do it again."""
    package = tmp_path / "sparsity_atlas"
    package.mkdir()
    (package / "__init__.py").touch()
    last = f"os.kill(os.getpid(), signal.{end})" if end.startswith("SIG") else f"raise {end}"
    lines = ["import os, signal", "open('ran', 'a').write(f'{os.getppid()} ')", last]
    (package / "__main__.py").write_text("\n".join(lines))
    path = os.pathsep.join(map(str, (tmp_path, HOOKS, ROOT / "src")))
    done = subprocess.run(
        [sys.executable, "-m", "sparsity_atlas"],
        env={**os.environ, "PYTHONPATH": path, "FORK_SERVER": server.address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    wanted = -signal.Signals[end] if end.startswith("SIG") else int(end[11:-1])
    assert (done.returncode, done.stderr) == (wanted, "")
    (parent,) = (tmp_path / "ran").read_text().split()
    assert int(parent) != os.getpid()


def test_its_id_is_its_own_until_somebody_asks_for_its_end(
    server: forks.Server, tmp_path: Path
) -> None:
    with open(os.devnull, "r+") as nothing:
        streams = (nothing.fileno(),) * 3
        process = Forked(
            server.address, ["-c", "pass"], cwd=tmp_path, env=dict(os.environ), streams=streams
        )
    while not _ended(process.pid):
        pass
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _run_with(server: forks.Server, folder: Path, **variables: str) -> int:
    env = {**os.environ, **variables}
    return forks.run("-c", "pass", server=server.address, cwd=folder, env=env).returncode


def test_another_environment_is_refused(server: forks.Server, tmp_path: Path) -> None:
    """What libraries read when they are imported, and no more."""
    with pytest.raises(BlockingIOError, match="another OMP_NUM_THREADS"):
        _run_with(server, tmp_path, OMP_NUM_THREADS="7")
    assert _run_with(server, tmp_path, CUDA_VISIBLE_DEVICES="1") == 0


def test_where_the_hub_is_must_be_known_to_who_imports_its_libraries(
    server: forks.Server, tmp_path: Path
) -> None:
    assert _run_with(server, tmp_path, HF_HOME="x") == 0
    with tempfile.TemporaryDirectory() as folder:
        other = forks.Server(Path(folder), ["huggingface_hub"], os.environ)
        with pytest.raises(BlockingIOError, match="another HF_HOME"):
            _run_with(other, tmp_path, HF_HOME="x")
        other.close()
