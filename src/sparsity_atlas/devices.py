"""Where models run and in which type."""

from __future__ import annotations

import fcntl
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    import torch

# GPUs that this process holds until it ends, with their locks.
_claimed: dict[int, IO[str]] = {}


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        AtlasError: the device asked for is not there.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, there in present.items() if there)
    if not present[device]:
        raise AtlasError(f"device: {device} is not available here; use auto or cpu")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> str:
    """`auto` is float32 on the CPU and the checkpoint's own type (still `auto`) elsewhere."""
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype


def claim_gpu(identities: list[str], folder: Path | None = None, poll: float = 1.0) -> int:
    """Wait for a GPU that no other job of ours uses, and keep it until this process ends.

    Snakemake starts as many jobs as there are cores and assigns no GPU to them.

    Args:
        identities: a name for each visible GPU that holds on the whole machine.
        folder: of the lock files; by default the system's for temporary files.
        poll: seconds between two looks.

    Returns:
        Index of the GPU.
    """
    locks = Path(folder or tempfile.gettempdir())
    while True:
        for index, identity in enumerate(identities):
            file = (locks / f"sparsity-atlas-gpu-{identity}.lock").open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _claimed[index] = file
            return index
        time.sleep(poll)


def own_device(device: torch.device) -> torch.device:
    """The device to load a model on: of several jobs and GPUs, each job has a GPU of its own."""
    import torch

    if device.type != "cuda":
        return device
    if _claimed:  # a process that loads one model after the other would wait for itself
        return torch.device("cuda", next(iter(_claimed)))
    uuids = [
        str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
    ]
    return torch.device("cuda", claim_gpu(uuids))
