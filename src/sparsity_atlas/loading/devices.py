"""Where models run and in which type."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("sparsity_atlas")

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}

# Of the environment: jobs that may be on a GPU at once, for models that leave most of it idle.
SHARES = "SPARSITY_ATLAS_GPU_SHARES"

# GPUs that this process holds until it ends: the lock, and the file that those share who wait for it.
_claimed: list[tuple[IO[str], Path]] = []


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


def how(settings: dict[str, Any]) -> dict[str, Any]:
    """What a stage's settings say of where and how a model is loaded, as `grid.loading_slice` gives it."""
    return {key: settings[key] for key in ("dtype", "device", "device_map") if key in settings}


def visible_gpus() -> int:
    """NVIDIA GPUs that a job of this machine may use, without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([one for one in chosen.split(",") if one.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def inside_allocation() -> bool:
    """Whether this process is part of a job that a cluster's scheduler gave its cores."""
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "KUBERNETES_SERVICE_HOST")
    return any(name in os.environ for name in names)


def gpu_shares() -> int:
    """Jobs that may be on a GPU at once: one, or what the environment says.

    Raises:
        AtlasError: it says no such number.
    """
    value = os.environ.get(SHARES, "1")
    if not value.isdecimal() or int(value) < 1:
        raise AtlasError(f"{SHARES}: expected a number of jobs, 1 or more, found '{value}'")
    return int(value)


def claim_gpu(
    identities: list[str],
    folder: Path | None = None,
    poll: float = 1.0,
    shares: int | None = None,
) -> int:
    """Wait for a GPU that no other job of ours uses, and keep it until this process ends.

    Snakemake starts as many jobs as there are cores and assigns no GPU to them.

    Args:
        identities: a name for each visible GPU that holds on the whole machine.
        folder: of the lock files; by default the system's for temporary files.
        poll: seconds between two looks.
        shares: jobs that may be on each; None: as the environment says.

    Returns:
        Index of the GPU.
    """
    locks = Path(folder or tempfile.gettempdir())
    told = False
    # Named by the user: nobody may open the lock file of another one in a shared /tmp.
    names = [_share(one, share) for share in range(shares or gpu_shares()) for one in identities]
    stems = [f"sparsity-atlas-{os.getuid()}-gpu-{name}" for name in names]
    with contextlib.ExitStack() as waiting:
        while True:
            for index, stem in enumerate(stems):
                file = (locks / f"{stem}.lock").open("a")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    continue
                _claimed.append((file, locks / f"{stem}.wanted"))
                if told:
                    logger.info("a GPU is free")
                return index % len(identities)
            if not told:
                logger.info("all %d GPUs are in use by other jobs; waiting", len(identities))
                told = True
                for stem in stems:
                    wanted = waiting.enter_context((locks / f"{stem}.wanted").open("a"))
                    fcntl.flock(wanted, fcntl.LOCK_SH)
            time.sleep(poll)


def _share(identity: str, number: int) -> str:
    """Name of a share of a GPU; that of a job that has it for itself is the first."""
    return f"{identity}-{number}" if number else identity


def _holds(name: str) -> bool:
    """Whether this process has claimed a GPU's share: it would wait for itself."""
    stem = f"sparsity-atlas-{os.getuid()}-gpu-{name}"
    return any(path.stem == stem for _, path in _claimed)


def others_wait() -> bool:
    """Whether another job waits for the GPU that this process has claimed."""
    for _, path in _claimed:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def own_device(device: torch.device) -> torch.device:
    """The device to load a model on: of several jobs and GPUs, each job has a GPU of its own.

    Ask before the model is loaded: a job that waits for a GPU would hold the weights in memory.
    """
    import torch

    return torch.device("cuda", _own_gpu()) if device.type == "cuda" else device


def own_devices(device: torch.device) -> list[torch.device]:
    """All devices of a kind for a model that is spread over them, each of them this process's own.

    Ask before the model is loaded, as for `own_device`.
    """
    import torch

    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", index) for index in _all_gpus()]


@functools.cache
def _all_gpus() -> tuple[int, ...]:
    """All GPUs, each share claimed in its turn: of two processes that want all, one waits for the first."""
    uuids = _uuids()
    for share in range(gpu_shares()):
        for one in uuids:
            if not _holds(_share(one, share)):
                claim_gpu([_share(one, share)], shares=1)
    _settle(0)
    return tuple(range(len(uuids)))


def _uuids() -> list[str]:
    import torch

    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


@functools.cache
def _own_gpu() -> int:
    """This process's GPU, among those that CUDA_VISIBLE_DEVICES leaves; made the current one."""
    uuids = _uuids()
    held = [number for number, one in enumerate(uuids) if _holds(one)]
    index = held[0] if held else claim_gpu(uuids)
    _settle(index)
    return index


def _settle(index: int) -> None:
    """Set this process up for its GPU, or for the first one of all."""
    import torch

    # Kernels and allocations that name no device would go to the first GPU, which is another job's.
    torch.cuda.set_device(index)
    # From Hopper on torch prefers cuDNN's attention, which makes a plan of 0.1 s and more for each shape that
    # a process has not seen; nearly every batch here has a shape of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
