"""Settings of all tests; being here, it also puts tests/ (with `tiny_models`) on the path."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Before transformers is imported: no test may look for a model outside.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Nor may it find there, or leave there, what another run made of a data file or a task.
_CACHE = tempfile.mkdtemp(prefix="sparsity-atlas-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ["XDG_CACHE_HOME"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
# Before Triton is imported: its interpreter runs the CUDA kernels on the CPU.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that look at the same run stay in one process, as do those of one file."""
    for item in items:
        folder, name = item.path.parts[-2:]
        shares = "smoke" in getattr(item, "fixturenames", ())
        group = "smoke" if shares else folder if folder == "faults" else f"{folder}/{name}"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: for tiny tensors, waiting for a second one takes most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
