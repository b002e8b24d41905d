"""A share of the mass on CUDA, in CUDA C++ for Hopper and later: `share.cu`.

For many rows and power 1; everything else is `cuda`'s, in Triton.
"""

from __future__ import annotations

import ctypes
import functools
import math
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsity_atlas.kernels import nvrtc
from sparsity_atlas.kernels.definition import mass_bits

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.kernels.definition import Threshold

# Beside the kernel itself; `PAIRS` is what kernels of other rooms take, too.
PAIRS = "pairs.cu"
FILES = ("share_device.cu", PAIRS, "share.cu")
ENTRY = "mask_rows"
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
READ = 16  # bytes that a thread reads at once
# Of narrower rows a mass would have too many bits for the kernel.
LEAST_WIDTH = 256
_WARP = 32
# Of vectors that a thread reads: threads that a processor shall have about place for, and how much longer
# a place takes. Fitted to what was fastest, on an H200, of 500 cuts of widths from 2,048 to 28,672.
_Forms = dict[int, tuple[int, float]]
_HALVES: _Forms = {
    **{
        4: (960, 1.12),
        5: (896, 1.06),
        6: (896, 1.0),
        7: (768, 1.0),
        8: (750, 1.01),
        9: (640, 1.05),
    },
    **{10: (640, 1.09), 11: (640, 1.12), 12: (512, 1.12), 13: (512, 1.12), 14: (512, 1.03)},
    15: (512, 1.08),
}
_WEIGHTED: _Forms = {4: (1024, 1.0), 5: (864, 1.0), 6: (768, 1.0), 7: (640, 1.05), 8: (640, 1.05)}
_FLOATS: _Forms = {
    **{4: (1280, 1.03), 5: (1152, 1.08), 6: (1056, 1.0), 7: (1024, 1.04), 8: (960, 1.0)},
    **{9: (800, 1.05), 11: (640, 1.05)},
}
# By whether numbers have 16 bits, and weights.
_CUTS = {
    (True, False): _HALVES,
    (True, True): _WEIGHTED,
    (False, False): _FLOATS,
    (False, True): _FLOATS,
}
_LARGEST_BLOCK, _MOST_BLOCKS = 1024, 32


class Cut(NamedTuple):
    """How a row is shared out: threads, what each reads, and blocks of a processor at least."""

    threads: int
    vectors: int
    blocks: int


def first_guess(rule: Threshold) -> tuple[float, float]:
    """Of a share: a threshold over the mean score, and one over the power of a threshold that the mass below
    it is taken for."""
    rest = max(1 - rule.amount, 0.0)
    # A density that is finite at zero has power + 1; it falls off, here as if exponentially.
    return 2 * rest ** (0.6 / rule.power), 1 / ((rule.power + 1) * (1 - 0.67 * rest**0.6))


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
    best, cut = math.inf, None
    for each, (at_once, factor) in _CUTS[dtype.itemsize == 2, rule.weights is not None].items():
        threads = -(-vectors // (each * _WARP)) * _WARP
        if threads > _LARGEST_BLOCK:
            continue
        blocks = min(max(1, int(at_once / threads + 0.3)), _MOST_BLOCKS)
        # Places that stay empty, and threads that find none or lack registers.
        ratio = blocks * threads / at_once
        cost = each * threads / vectors * factor * math.sqrt(max(ratio, 1 / ratio))
        if cost < best:
            best, cut = cost, Cut(threads, each, blocks)
    return cut


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
