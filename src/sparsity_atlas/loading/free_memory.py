"""Whether what is about to run fits into the memory that there is; what does not is said before it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity_atlas import cli
from sparsity_atlas.allocator import give_back
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.devices import ITEM_BYTES
from sparsity_atlas.loading.gguf_file import count_numbers
from sparsity_atlas.loading.quantised import METHODS, method_of

if TYPE_CHECKING:
    import torch

    from sparsity_atlas.loading.checkpoint import Checkpoint

GIB = 2**30
# Measured peaks lie within this factor of what `memory` says: beyond it nothing is tried.
TRUSTED = 1.25
# What numba and LLVM take of a process when its first kernel runs, which is after room was looked at.
COMPILER = 112 * 2**20
# Where the kernel states what a group of processes may use: version 2, version 1.
_GROUPS = (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"))
_OWN_GROUPS = "/proc/self/cgroup"


def host_limit() -> tuple[int, str]:
    """Bytes that this process may use, and who says so: the job, its control group, or the machine."""
    import psutil

    limits = [(psutil.virtual_memory().total, "this machine has")]
    told = os.environ.get("SLURM_MEM_PER_NODE", "")
    if told.isdecimal() and int(told):
        limits.append((int(told) * 2**20, "this job was given"))
    limits += [(size, "this job was given") for size in _group_limits()]
    return min(limits)


def _group_limits() -> list[int]:
    """Limits of the control groups that this process is in."""
    try:
        lines = Path(_OWN_GROUPS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for root, name in _GROUPS:
        for line in lines:
            own = Path(root, line.rsplit(":", 1)[-1].lstrip("/"))
            for place in (own, *own.parents):
                try:
                    content = (place / name).read_text(encoding="utf-8").strip()
                except OSError:
                    continue
                if content.isdecimal():
                    found.append(int(content))
    return found


def free(device: torch.device) -> tuple[int, int, str]:
    """Bytes for what is still to come on a device, bytes in all, and whose limit that is."""
    import psutil
    import torch

    if device.type == "cuda":
        unused, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused + idle, total, "this GPU has"
    limit, whose = host_limit()
    give_back()  # what is kept for nothing is free, too
    to_come = 0 if "llvmlite" in sys.modules else COMPILER
    return limit - psutil.Process().memory_info().rss - to_come, limit, whose


def check(
    device: torch.device,
    needed: Callable[[float], int],
    what: str,
    settings: tuple[tuple[str, int], ...],
) -> None:
    """Refuse what surely does not fit, and warn of what may not.

    Args:
        device: where it is to run.
        needed: bytes that it takes, by the share of a batch.
        what: is to run.
        settings: keys of the configuration with their values: the smaller, the less it takes. The first
            one that would do is named.

    Raises:
        AtlasError: in one line, with what would fit.
    """
    room, limit, whose = free(device)
    wanted = needed(1.0)
    if wanted <= room:
        return
    fitting = next(
        (
            f"{key}: {value} would fit"
            for key, now in settings
            for value in _smaller(now)
            if needed(value / now) <= room
        ),
        f"no {' or '.join(key for key, _ in settings)} would fit",
    )
    message = (
        f"{what}: needs about {wanted / GIB:.1f} GiB beside what is in memory already, and "
        f"{whose} {limit / GIB:.1f} GiB, of which {max(room, 0) / GIB:.1f} are left; {fitting}"
    )
    if wanted > TRUSTED * max(room, 0):
        raise AtlasError(message)
    cli.logger.warning("%s", message)


def check_weights(checkpoint: Checkpoint, dtype: str) -> int:
    """Refuse weights that are larger than the memory that they are read into.

    Args:
        checkpoint: the model's files.
        dtype: that they are held in; `auto`: their own.

    Returns:
        Bytes that they take.

    Raises:
        AtlasError: in one line.
    """
    config = checkpoint.config()
    own = ITEM_BYTES.get(str(checkpoint.dtype()), 4)
    if checkpoint.gguf is None:
        files = sum(path.stat().st_size for path in checkpoint.weight_files())
        method = METHODS.get(method_of(config) or "")
        if method is not None and (checkpoint.dequantise or method.unpacks):
            files *= method.growth
        elif method is not None:
            dtype = "auto"  # it stays as it lies in the file
    else:
        files = count_numbers(checkpoint.folder / checkpoint.gguf) * own
    limit, whose = host_limit()
    wanted = files * ITEM_BYTES.get(dtype, own) // own
    if wanted <= limit:
        return wanted
    less = "dtype: bfloat16 would fit" if files * 2 // own <= limit else "no dtype would fit"
    raise AtlasError(
        f"{checkpoint}: its weights take {wanted / GIB:.1f} GiB, and {whose} {limit / GIB:.1f} GiB; {less}"
    )


def check_on_device(
    what: str, wanted: int, devices: Sequence[torch.device], *, spread: bool
) -> None:
    """Say what a model's weights need and what there is, and refuse those that do not fit on one GPU.

    Args:
        what: the model.
        wanted: bytes of its weights.
        devices: that it is to be on.
        spread: whether it may be on several, and in host memory.

    Raises:
        AtlasError: in one line.
    """
    if devices[0].type != "cuda":
        return
    rooms = [free(one)[0] for one in devices]
    if spread:
        limit, whose = host_limit()
        shown = " + ".join(f"{room / GIB:.1f}" for room in rooms)
        cli.logger.info(
            "%s: its weights take %.1f GiB; %s GiB are left on the GPUs, and %s %.1f GiB of memory",
            *(what, wanted / GIB, shown, whose, limit / GIB),
        )
        return
    if wanted > rooms[0]:
        raise AtlasError(
            f"{what}: its weights take {wanted / GIB:.1f} GiB, and of this GPU's memory "
            f"{rooms[0] / GIB:.1f} GiB are left; device_map: auto in the model's entry spreads them over all "
            "GPUs and host memory"
        )


def _smaller(value: int) -> list[int]:
    """Half of it, a quarter, and so on, down to 1."""
    return [value >> step for step in range(1, value.bit_length())]
