"""Jobs on one machine share its GPUs without sharing a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsity_atlas.devices import pick_device, pick_dtype
from sparsity_atlas.errors import AtlasError

CLAIM = """
import sys
from pathlib import Path
from sparsity_atlas.devices import claim_gpu
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
