"""Blocks of tensors go back to the system when nothing needs them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparsity_atlas import allocator

# Takes and frees blocks of 24 MiB, one behind another and with small ones in between, and says what stays.
KEPT = """
import psutil
from sparsity_atlas import allocator
if {bound}:
    allocator.bound_heap()
import torch
here = psutil.Process().memory_info
torch.ones(31 * 2**18)
before, small = here().rss, []
for _ in range(8):
    blocks = [torch.ones(6 * 2**20) for _ in range(4)]
    small.append(torch.ones(100))
    del blocks
print(here().rss - before)
"""
glibc = pytest.mark.skipif(allocator._glibc("mallopt") is None, reason="not glibc")


def kept(*, bound: bool, **settings: str) -> int:
    code = KEPT.format(bound=bound)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    return int(subprocess.check_output([sys.executable, "-c", code], env=environment))


@glibc
def test_freed_blocks_do_not_stay() -> None:
    assert kept(bound=True) < 16 * 2**20 < kept(bound=False)


@glibc
def test_what_a_user_says_to_glibc_stays() -> None:
    assert kept(bound=True, MALLOC_MMAP_THRESHOLD_=str(2**25)) > 16 * 2**20


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda _: None)
    monkeypatch.setattr("os.environ", {})
    allocator.bound_heap()
    allocator.give_back()
    assert os.environ == {"THP_MEM_ALLOC_ENABLE": "1"}
