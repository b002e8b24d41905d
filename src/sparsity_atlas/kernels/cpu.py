"""Thresholds on the CPU: rows in parallel, one row in cache at a time (`cpu_row`)."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsity_atlas.kernels.cpu_row import KINDS, mask_rows
from sparsity_atlas.kernels.definition import limbs, mass_bits, not_above

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sparsity_atlas.kernels.definition import Threshold

# Below this many entries, starting threads takes longer than the work.
_WORTH_A_THREAD = 1 << 16

_NO_LIMBS = np.zeros(0, dtype=np.int64)

_pool: ThreadPoolExecutor | None = None


def masked(rule: Threshold, values: Tensor, onto: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.masked`, for tensors [rows, width] on the CPU."""
    rows, width = values.shape
    values, onto = values.contiguous(), onto.contiguous()
    out = torch.empty_like(onto)
    zeros = np.empty(rows, dtype=np.int64)
    finite = np.empty(rows, dtype=np.bool_)
    nothing = np.empty(0, dtype=np.float32)
    arguments = (
        bits_of(values),
        bits_of(onto),
        bits_of(out),
        zeros,
        finite,
        nothing if rule.weights is None else rule.weights.numpy(),
        nothing if rule.constants is None else rule.constants.numpy(),
        KINDS[rule.kind],
        not_above(rule.amount) if rule.kind == "peak" else float(rule.amount),
        _limbs(rule.amount) if rule.kind == "share" and rule.amount < 1 else _NO_LIMBS,
        float(rule.power),
        2.0 ** mass_bits(width),
        values.dtype == torch.float16,
    )
    in_parts(mask_rows, arguments, rows, width)
    return out, torch.from_numpy(zeros), torch.from_numpy(finite)


def in_parts(work: Callable[..., None], arguments: tuple[Any, ...], rows: int, width: int) -> None:
    """Do some work on all rows, by as many threads as torch has.

    Args:
        work: compiled, holds no lock; gets the arguments, and which rows it is for: the first, and the one
            after the last.
        arguments: its own.
        rows: in all.
        width: entries of a row.
    """
    parts = min(torch.get_num_threads(), max(1, rows * width // _WORTH_A_THREAD))
    edges = [rows * part // parts for part in range(parts + 1)]
    if parts == 1:
        work(*arguments, 0, rows)
        return
    pool = _threads(parts)
    tasks = [pool.submit(work, *arguments, first, last) for first, last in pairwise(edges)]
    for task in tasks:
        task.result()


@functools.lru_cache(maxsize=256)
def _limbs(amount: float) -> np.ndarray:
    return np.array(limbs(amount), dtype=np.int64)


def bits_of(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as signed integers of its size."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads of our own: the kernel holds no lock, and Numba's pools quarrel with torch's."""
    global _pool
    if _pool is None or _pool._max_workers < count:
        _pool = ThreadPoolExecutor(count, thread_name_prefix="sparsity-atlas-kernel")
    return _pool
