"""Workers are private, end when idle, and are not started where nobody may leave a process behind."""

from __future__ import annotations

import errno
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from unittest.mock import Mock

import pytest

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import evaluate
from sparsity_atlas.evaluation.worker import slots
from sparsity_atlas.evaluation.worker.client import wanted
from sparsity_atlas.evaluation.worker.server import Models, answer
from sparsity_atlas.evaluation.worker.slots import Slot, folder_for, free_slot, places

SERVE = """
import sys
from pathlib import Path
from sparsity_atlas.evaluation.worker.server import serve
serve(Path(sys.argv[1]), idle=float(sys.argv[2]))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def start(slot: Slot, idle: float = 60, script: str = SERVE) -> subprocess.Popen:
    lock = slot.try_lock()
    assert lock is not None
    _ = slot.key
    process = subprocess.Popen([sys.executable, "-c", script, str(slot.folder), str(idle)])
    while slot.connect() is None:
        assert process.poll() is None
        time.sleep(0.02)
    lock.close()
    return process


def test_a_worker_that_nobody_needs_ends(folder: Path) -> None:
    slot = Slot(folder / "0")
    process = start(slot, idle=0.3)
    assert process.wait(timeout=30) == 0
    assert not slot.socket.exists()


SERVE_ON_A_GPU = """
import sys
from pathlib import Path
from sparsity_atlas.loading import devices
from sparsity_atlas.evaluation.worker import server
folder = Path(sys.argv[1])
devices.claim_gpu(["a"], folder)
server.IDLE_WHILE_OTHERS_WAIT = 0.2
server.serve(folder, idle=120)
"""


def test_a_worker_with_nothing_to_do_leaves_its_gpu_to_who_waits_for_it(folder: Path) -> None:
    slot = Slot(folder / "0")
    process = start(slot, script=SERVE_ON_A_GPU)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    claim = "import sys, pathlib; from sparsity_atlas.loading.devices import claim_gpu\n"
    claim += "claim_gpu(['a'], pathlib.Path(sys.argv[1]), poll=0.05)"
    subprocess.run([sys.executable, "-c", claim, str(slot.folder)], check=True, timeout=60)
    assert process.wait(timeout=30) == 0


def test_a_worker_whose_slot_is_held_waits(folder: Path) -> None:
    slot = Slot(folder / "0")
    process = start(slot, idle=0.2)
    with free_slot(folder, 1) as (_, connection):
        assert connection is not None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.5)
    assert process.wait(timeout=30) == 0


def test_a_stranger_is_turned_away_and_the_worker_lives(folder: Path) -> None:
    slot = Slot(folder / "0")
    process = start(slot, idle=60)
    try:
        with pytest.raises(AuthenticationError):
            Client(str(slot.socket), family="AF_UNIX", authkey=b"guess")
        with free_slot(folder, 1) as (_, connection):
            assert connection is not None
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_the_key_and_the_folder_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    slot = Slot(folder_for(Path("model.json"), "code") / "0")
    lock = slot.try_lock()
    assert lock is not None
    assert len(slot.key) == 32
    lock.close()
    assert (slot.folder / "key").stat().st_mode & 0o777 == 0o600
    base = slot.folder.parents[1]
    assert base.stat().st_mode & 0o777 == 0o700
    base.chmod(0o755)
    with pytest.raises(AtlasError, match="this user's alone"):
        folder_for(Path("model.json"), "code")


def test_other_code_or_another_model_has_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = {folder_for(Path(m), c) for m in ("a.json", "b.json") for c in ("x", "y")}
    assert len(folders) == 4
    folders |= {folder_for(Path("a.json"), "x", {"DATA": one}) for one in (None, "1")}
    assert len(folders) == 6
    names = ("OMP_NUM_THREADS", "SPARSITY_ATLAS_KERNELS", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
    for name in names:
        monkeypatch.setenv(name, "7")
        folders.add(folder_for(Path("a.json"), "x"))
    assert len(folders) == 6 + len(names)


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (AtlasError("tasks.a: none"), "error", "tasks.a: none"),
        (OSError(errno.ENOSPC, "full", "a.json"), "error", "a.json: no space is left"),
        (OSError(errno.ENOTSOCK, "odd"), "crash", "Traceback"),
        (ZeroDivisionError("odd"), "crash", "Traceback"),
        (SystemExit(2), "error", "exit code 2"),
        (None, "done", ""),
    ],
)
def test_how_a_stage_ended_is_told(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, kind: str, text: str
) -> None:
    # Raised by a library: what stands in somebody's own file ends in one line.
    monkeypatch.setattr(evaluate, "main", Mock(side_effect=raised))
    ours, workers = multiprocessing.Pipe()
    ours.send_bytes(json.dumps({"arguments": [], "task_files": []}).encode())
    answer(workers, Models())
    told = json.loads(ours.recv_bytes())
    assert told["kind"] == kind
    assert text in told["text"]


def test_one_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert places("auto") == places("cuda") == 2
    assert places("cpu") == slots.MOST
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert places("auto") == slots.MOST


def test_a_second_client_gets_the_second_slot(folder: Path) -> None:
    with free_slot(folder, 2) as (first, _), free_slot(folder, 2) as (second, _):
        assert {first.folder.name, second.folder.name} == {"0", "1"}


def test_no_worker_inside_a_clusters_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSITY_ATLAS_WORKER", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert wanted()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not wanted()
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("SPARSITY_ATLAS_WORKER", "off")
    assert not wanted()
