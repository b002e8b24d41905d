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
from checkout import HOOKS, ROOT, Checkout
from hooks.forking import Forked

DIE = "import os; os.kill(os.getpid(), {})"


@pytest.fixture(scope="module")
def servers() -> Iterator[forks.Servers]:
    """One without libraries, and one that knows where the Hub is; a socket's path must be short."""
    with tempfile.TemporaryDirectory() as folder:
        made = forks.Servers(Path(folder), [[], ["huggingface_hub"]], os.environ)
        yield made
        made.close()


@pytest.fixture(scope="module")
def server(servers: forks.Servers) -> str:
    """The socket of the first."""
    return servers.addresses[0]


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
def test_ends_alike(server: str, tmp_path: Path, code: str, returncode: int, said: str) -> None:
    forked = forks.run("-c", code, merged=False, server=server, cwd=tmp_path, env=dict(os.environ))
    real = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert forked.returncode == real.returncode == returncode
    assert forked.stdout == real.stdout
    assert forked.stderr.rstrip().endswith(said)


@pytest.mark.parametrize("end", [*("SystemExit(0)", "SystemExit(4)"), "SIGKILL", "SIGTERM"])
def test_who_has_its_work_done_ends_as_the_work_did(server: str, tmp_path: Path, end: str) -> None:
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
        env={**os.environ, "PYTHONPATH": path, "FORK_SERVER": server},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    wanted = -signal.Signals[end] if end.startswith("SIG") else int(end[11:-1])
    assert (done.returncode, done.stderr) == (wanted, "")
    (parent,) = (tmp_path / "ran").read_text().split()
    assert int(parent) != os.getpid()


def test_its_id_is_its_own_until_somebody_asks_for_its_end(server: str, tmp_path: Path) -> None:
    with open(os.devnull, "r+") as nothing:
        streams = (nothing.fileno(),) * 3
        process = Forked(
            server, ["-c", "pass"], cwd=tmp_path, env=dict(os.environ), streams=streams
        )
    while not _ended(process.pid):
        pass
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _run_with(server: str, folder: Path, **variables: str) -> int:
    env = {**os.environ, **variables}
    return forks.run("-c", "pass", server=server, cwd=folder, env=env).returncode


def test_another_environment_is_refused(server: str, tmp_path: Path) -> None:
    """What libraries read when they are imported, and no more."""
    with pytest.raises(BlockingIOError, match="another OMP_NUM_THREADS"):
        _run_with(server, tmp_path, OMP_NUM_THREADS="7")
    assert _run_with(server, tmp_path, CUDA_VISIBLE_DEVICES="1") == 0


def test_where_the_hub_is_must_be_known_to_who_imports_its_libraries(
    servers: forks.Servers, tmp_path: Path
) -> None:
    first, further = servers.addresses
    assert _run_with(first, tmp_path, HF_HOME="x") == 0
    with pytest.raises(BlockingIOError, match="another HF_HOME"):
        _run_with(further, tmp_path, HF_HOME="x")


@pytest.mark.parametrize("end", ["SystemExit(4)", "SIGKILL"])
def test_a_worker_is_a_fork_that_ends_as_the_work_does(server: str, end: str) -> None:
    """As pytest-xdist calls it: what is to be done comes in at its standard input."""
    last = f"os.kill(os.getpid(), signal.{end})" if end == "SIGKILL" else f"raise {end}"
    code = f"import os, signal, sys; print(os.getppid(), sys.stdin.read(), flush=True); {last}"
    command = [sys.executable, HOOKS / "worker.py", server, "-u", "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate("here")
    assert process.returncode == (-signal.SIGKILL if end == "SIGKILL" else 4)
    parent, *words = said.split()
    assert words == ["here"]
    assert int(parent) not in (os.getpid(), process.pid)


def test_code_of_models_goes_where_each_process_is_told(tmp_path: Path) -> None:
    """Though the library that copies it there is imported by then."""
    code = "from transformers import dynamic_module_utils; print(dynamic_module_utils.HF_MODULES_CACHE)"
    for name in ("one", "other"):
        done = forks.run("-c", code, **Checkout(tmp_path).forked(HF_MODULES_CACHE=name))
        assert done.stdout == f"{name}\n"
