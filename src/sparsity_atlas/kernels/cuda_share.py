"""A share of the mass on CUDA, in CUDA C++ for Hopper and later: `share.cu`.

For many rows and power 1; everything else is `cuda`'s, in Triton.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsity_atlas.kernels import nvrtc
from sparsity_atlas.kernels.definition import mass_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparsity_atlas.kernels.definition import Threshold

FILES = ("share_device.cu", "share.cu")
ENTRY = "mask_rows"
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
READ = 16  # bytes that a thread reads at once
# Of narrower rows a mass would have too many bits for the kernel.
LEAST_WIDTH = 256
_WARP = 32
# By whether numbers have 16 bits, and weights: vectors a thread, the preferred first, up to so many threads a
# row, and those that a processor shall have place for. What was fastest on an H200 at 2,048 to 28,672.
_CUTS: dict[tuple[bool, bool], list[tuple[Sequence[int], int, int]]] = {
    (True, False): [((7, 8, 6, 5), 256, 768), (range(14, 8, -1), 256, 512), ((14,), 1024, 512)],
    (True, True): [(range(4, 9), 1024, 1024)],
    (False, False): [((8, 7, 6, 5), 1024, 900)],
    (False, True): [((8, 7, 6, 5), 1024, 900)],
}


class Cut(NamedTuple):
    """How a row is shared out: threads, what each reads, and blocks of a processor at least."""

    threads: int
    vectors: int
    blocks: int


def cut_of(rule: Threshold, width: int, dtype: torch.dtype) -> Cut | None:
    """How rows are cut; None where the kernel is not made for them.

    Args:
        rule: any.
        width: of the rows.
        dtype: of the values.
    """
    if rule.kind != "share" or rule.power != 1 or rule.amount >= 1 or width < LEAST_WIDTH:
        return None
    if dtype not in TYPES:
        return None
    each_read = READ // dtype.itemsize
    # A row that is no whole number of vectors may begin at any place in its first one.
    most = width + (each_read - 1 if is_ragged(width, dtype) else 0)
    vectors = -(-most // each_read)
    for each, limit, at_once in _CUTS[dtype.itemsize == 2, rule.weights is not None]:
        cuts = [(one, -(-vectors // (one * _WARP)) * _WARP) for one in each]
        fitting = [(one * threads, one, threads) for one, threads in cuts if threads <= limit]
        if fitting:
            least = min(places for places, _, _ in fitting)
            # Of those that leave the fewest places empty, the first.
            _, one, threads = next(cut for cut in fitting if cut[0] == least)
            return Cut(threads, one, max(1, at_once // threads))
    return None


def masked(
    values: Tensor,
    onto: Tensor,
    out: Tensor,
    zeros: Tensor,
    finite: Tensor,
    weights: Tensor | None,
    numbers: Tensor,
    cut: Cut,
) -> None:
    """Write `out`, `zeros` and `finite` of `cuda.masked`.

    Args:
        values: [rows, width], `is_aligned`, as `onto` is.
        onto: of the same shape and type.
        out: of the same shape and type, contiguous.
        zeros: int32 [rows].
        finite: bool [rows].
        weights: float32 [width].
        numbers: of `cuda.numbers_of`.
        cut: of `cut_of`.
    """
    rows, width = values.shape
    same = onto.data_ptr() == values.data_ptr() and onto.stride() == values.stride()
    defined = {
        "TYPE": TYPES[values.dtype],
        "WEIGHTED": int(weights is not None),
        "SAME": int(same),
        "RAGGED": int(is_ragged(width, values.dtype)),
        "MASS_BITS": mass_bits(width),
        "THREADS": cut.threads,
        "VECTORS": cut.vectors,
        "BLOCKS": cut.blocks,
    }
    tensors = values, onto, out, zeros, finite, numbers if weights is None else weights, numbers
    launch(defined, rows, tensors, (width, values.stride(0), onto.stride(0)))


def is_ragged(width: int, dtype: torch.dtype) -> bool:
    """Whether rows are no whole number of what a thread reads at once."""
    return bool(width * dtype.itemsize % READ)


def is_aligned(rows: Tensor) -> bool:
    """Whether rows without gaps begin at whole 16 bytes; ragged ones, the first, and no gap is between."""
    if rows.stride(1) != 1 or rows.data_ptr() % READ:
        return False
    if is_ragged(rows.shape[1], rows.dtype):
        return rows.is_contiguous()
    return rows.stride(0) * rows.element_size() % READ == 0


def launch(
    defined: dict[str, int], rows: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]
) -> None:
    """Launch the kernel.

    Args:
        defined: what its file wants to be fixed.
        rows: blocks.
        tensors: its first arguments.
        numbers: its last ones.
    """
    from cuda.bindings import driver

    device = tensors[0].device
    kernel = _kernel(tuple(defined.items()), device)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = rows, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = defined["THREADS"], 1, 1
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    arguments = (*(one.data_ptr() for one in tensors), *numbers)
    types = (*[ctypes.c_void_p] * len(tensors), *[ctypes.c_int] * len(numbers))
    with torch.cuda.device(device):
        nvrtc.done(driver.cuLaunchKernelEx(config, kernel, (arguments, types), 0))


def text() -> bytes:
    """All of the kernel's files."""
    return b"".join(resources.files(__package__).joinpath(name).read_bytes() for name in FILES)


@functools.cache
def _kernel(defined: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    """The kernel for a device, compiled for what is defined."""
    return nvrtc.loaded(text(), FILES[-1], ENTRY, dict(defined), device)
