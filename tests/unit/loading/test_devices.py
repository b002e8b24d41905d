"""Jobs on one machine share its GPUs without sharing a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkout import Checkout
from hooks.forking import Forked
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.worker import slots
from sparsity_atlas.loading import devices
from sparsity_atlas.loading.devices import pick_device, pick_dtype, visible_gpus

CLAIM = """
import sys
from pathlib import Path
from sparsity_atlas.loading.devices import claim_gpu
print(claim_gpu(["a", "b"], Path(sys.argv[1]), poll=0.05), flush=True)
sys.stdin.read()
"""


def _claim(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_each_job_has_a_gpu_of_its_own_and_a_third_waits(tmp_path: Path) -> None:
    jobs = [_claim(tmp_path), _claim(tmp_path)]
    held = {int(job.stdout.readline()): job for job in jobs}
    assert sorted(held) == [0, 1]
    third = _claim(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        third.wait(0.5)
    held[1].kill()  # the kernel frees the lock of a job that dies
    assert int(third.stdout.readline()) == 1
    for job in (*jobs, third):
        job.communicate(timeout=10) if job.poll() is None else job.stdout.close()


def _until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_holds_a_gpu_knows_whether_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_claimed", [])
    assert not devices.others_wait()
    other = _claim(tmp_path)  # takes the first of two
    assert other.stdout.readline() == "0\n"
    assert devices.claim_gpu(["a", "b"], tmp_path) == 1
    assert not devices.others_wait()
    waiting = [_claim(tmp_path), _claim(tmp_path)]
    _until(devices.others_wait)
    waiting[0].kill()
    waiting[0].wait()
    _until(devices.others_wait)
    other.kill()  # the one that is left gets the first GPU, and waits no more
    assert waiting[1].stdout.readline() == "0\n"
    _until(lambda: not devices.others_wait())
    for job in (other, *waiting):
        job.communicate(timeout=10) if job.poll() is None else job.stdout.close()


def test_a_gpu_may_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_claimed", [])
    monkeypatch.setenv("SPARSITY_ATLAS_GPU_SHARES", "2")
    # Each GPU once, before any of them has a second job.
    assert [devices.claim_gpu(["a", "b"], tmp_path) for _ in range(4)] == [0, 1, 0, 1]
    assert devices.claim_gpu(["a", "b"], tmp_path, shares=3) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert slots.places("auto") == 4


@pytest.mark.parametrize("value", ["0", "two", "", "-1"])
def test_no_number_of_jobs(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSITY_ATLAS_GPU_SHARES", value)
    with pytest.raises(AtlasError, match=f"SHARES: expected a number of jobs, .* found '{value}'"):
        devices.gpu_shares()


OWN = """
import os, sys, tempfile, types
import torch
tempfile.tempdir = sys.argv[1]
visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
torch.cuda.device_count = lambda: len(visible)
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(uuid=f"GPU-{visible[index]}")
torch.cuda.set_device = lambda index: print(index, end=" ")
from sparsity_atlas.loading.devices import own_device
first = own_device(torch.device("cuda"))
assert own_device(torch.device("cuda")) == first
assert not torch.backends.cuda.cudnn_sdp_enabled()
print(first.index, visible[first.index], flush=True)
sys.stdin.read()
"""


def test_of_the_visible_gpus_each_job_makes_a_free_one_its_own(tmp_path: Path) -> None:
    jobs, lines = [], []
    until, at_end = os.pipe()
    # The third sees only what the first two have left it, under another number.
    for visible in ("2,3", "2,3", "3,2,7"):
        said, say = os.pipe()
        how = Checkout(tmp_path).forked(CUDA_VISIBLE_DEVICES=visible)
        jobs.append(Forked(arguments=("-c", OWN, tmp_path), streams=(until, say, 2), **how))
        os.close(say)
        with open(said) as output:
            lines.append(output.readline().split())
    os.close(until)
    os.close(at_end)
    assert [job.wait(timeout=60) for job in jobs] == [0, 0, 0]
    # The current device, the device to load on, and which of the machine's it is.
    assert lines == [["0", "0", "2"], ["1", "1", "3"], ["2", "2", "7"]]


@pytest.mark.parametrize(("visible", "count"), [("0,1,2", 3), ("GPU-1a", 1), ("", 0), ("-1", 0)])
def test_gpus_are_counted_without_torch(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == count


def test_the_cpu_computes_in_float32_unless_told_otherwise() -> None:
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_dtype("auto", cpu) == "float32"
    assert pick_dtype("bfloat16", cpu) == "bfloat16"
    assert pick_dtype("auto", torch.device("cuda")) == "auto"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AtlasError, match="cuda is not available"):
        pick_device("cuda")
