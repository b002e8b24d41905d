"""Kernels in CUDA C++: compiled when they are first needed, for Hopper and what comes after it.

An optional way: `cuda.bindings` and its NVRTC come with torch for CUDA. Where they are missing, on an older
device, and for what these kernels are not made for, `cuda_products` does it with Triton.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas import kernels
from sparsity_atlas.kernels import nvrtc
from sparsity_atlas.kernels.cuda_share import PAIRS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# What all of them begin with, and what finds a threshold for one; the others, and the names of their kernels.
DEVICE = "device.cu"
SEARCH = {"cluster_product.cu": "row_share.cu"}
ENTRIES = {"cluster_product.cu": "by_inputs", "row_product.cu": "by_outputs"}
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Bytes that a thread reads at once.
READ = 16
# Of all places of a device, that a grid must fill to begin before the last launch has ended.
_FILLED = 2 / 3


@functools.cache
def has_clusters(device: torch.device) -> bool:
    """Whether a device has clusters of blocks, and this Python what compiles for it."""
    return nvrtc.is_there(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of Triton's interpreter, some."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    source: str,
    defined: dict[str, int],
    grid: tuple[int, int],
    shared: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    """Launch a kernel, which waits for what the last launch wrote itself.

    A grid that needs most places of the device may begin before the last launch has ended. Another would take
    the first places that this one leaves, many of its blocks on few processors: 8B's down projection, whose
    blocks have a processor each, then lay on 74 of an H200's 132 and took a third longer.

    Args:
        source: file, whose kernel has its name.
        defined: what the file wants to be fixed.
        grid: blocks; each of its rows is a cluster.
        shared: bytes of shared memory of a block.
        tensors: the kernel's first arguments.
        numbers: its last ones.
    """
    from cuda.bindings import driver

    device = tensors[0].device
    kernel, places = _kernel(source, tuple(defined.items()), grid, shared, device)
    config = _config(grid, defined["THREADS"], shared, chained=grid[1] > _FILLED * places)
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    arguments = (*(one.data_ptr() for one in tensors), *numbers)
    types = (*[ctypes.c_void_p] * len(tensors), *[ctypes.c_int] * len(numbers))
    with torch.cuda.device(device):
        nvrtc.done(driver.cuLaunchKernelEx(config, kernel, (arguments, types), 0))


def _config(grid: tuple[int, int], threads: int, shared: int, *, chained: bool) -> Any:
    """What a launch is told but for its stream: each row of the grid is a cluster."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    kinds = driver.CUlaunchAttributeID
    cluster, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    sizes = cluster.value.clusterDim
    sizes.x, sizes.y, sizes.z = grid[0], 1, 1
    early.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    attributes = [cluster, early] if chained else [cluster]
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@functools.cache
def _kernel(
    source: str,
    defined: tuple[tuple[str, int], ...],
    grid: tuple[int, int],
    shared: int,
    device: torch.device,
) -> tuple[Any, int]:
    """The kernel for a device, compiled for what is defined, and how many clusters have a place at once."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        # torch has made the context that the driver needs when it has done anything.
        torch.cuda.current_stream().synchronize()
    options = dict(defined)
    kernel = nvrtc.loaded(text(source), source, ENTRIES[source], options, device)
    attributes = driver.CUfunction_attribute
    most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    nvrtc.done(driver.cuFuncSetAttribute(kernel, most, shared))
    large = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    nvrtc.done(driver.cuFuncSetAttribute(kernel, large, 1))
    with torch.cuda.device(device):
        config = _config(grid, options["THREADS"], shared, chained=False)
        places: int = nvrtc.done(driver.cuOccupancyMaxActiveClusters(kernel, config))
    return kernel, places


def text(source: str) -> bytes:
    """All of a kernel's files."""
    parts = [resources.files(__package__).joinpath(DEVICE)]
    if source in SEARCH:
        parts += [
            resources.files(kernels).joinpath(PAIRS),
            resources.files(__package__).joinpath(SEARCH[source]),
        ]
    parts.append(resources.files(__package__).joinpath(source))
    return b"".join(one.read_bytes() for one in parts)
