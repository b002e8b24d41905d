"""The products of `maps` on a CPU: columns or rows are shared among threads, whose number moves no
digit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsity_atlas.decoding.cpu_rows import dot_rows, sum_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sparsity_atlas.decoding.vector import Vector

# Columns or rows that one thread takes at least.
_SHARE = 256

_pool: ThreadPoolExecutor | None = None


def by_inputs(vector: Vector, weight: Tensor) -> Tensor:
    """W (x ⊙ m), reading the rows of the transposed weight that x meets.

    Args:
        vector: x [tokens, K] and its mask.
        weight: Wᵀ [K, N], contiguous, float32 or bfloat16.

    Returns:
        float32 [tokens, N].
    """
    values = vector.masked().float().contiguous().numpy()
    places = np.flatnonzero((values != 0).any(0))
    sums = np.empty((len(values), weight.shape[1]), dtype=np.float32)
    _share(sum_rows, values, places, _numbers(weight), sums)
    return torch.from_numpy(sums)


def by_outputs(x: Tensor, weight: Tensor, factor: Tensor | None = None) -> Tensor:
    """Entries of W x from rows of W as it lies; only those where another factor is not zero.

    Args:
        x: [tokens, K].
        weight: W [N, K], contiguous.
        factor: [tokens, N].

    Returns:
        float32 [tokens, N]; what stands where no token's factor is other than zero is zero.
    """
    values = x.float().contiguous().numpy()
    wanted = np.ones(len(weight), dtype=np.bool_)
    if factor is not None:
        wanted = (factor != 0).any(0).numpy()
    out = np.empty((len(values), len(weight)), dtype=np.float32)
    _share(dot_rows, values, wanted, _numbers(weight), out)
    return torch.from_numpy(out)


def _numbers(weight: Tensor) -> np.ndarray[Any, Any]:
    """The weight as the compiled functions read it."""
    return (weight.view(torch.int16) if weight.element_size() == 2 else weight).numpy()


def _share(work: Callable[..., None], *arguments: np.ndarray[Any, Any]) -> None:
    """Have threads do parts of the last array's columns."""
    global _pool
    width = arguments[-1].shape[1]
    parts = min(torch.get_num_threads(), max(1, width // _SHARE))
    # Whole cache lines, so that no two threads write to one.
    edges = [width * part // parts // 16 * 16 for part in range(parts)] + [width]
    if parts == 1:
        work(*arguments, 0, width)
        return
    if _pool is None or _pool._max_workers < parts:
        _pool = ThreadPoolExecutor(parts, thread_name_prefix="sparsity-atlas-decoding")
    for task in [_pool.submit(work, *arguments, *ends) for ends in pairwise(edges)]:
        task.result()
