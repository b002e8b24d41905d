"""Masks on the CPU, compiled with Numba: what `patterns` defines, and a mask put to use in one pass.

All compiled functions stand in this one file, as in `cpu_row` and for its reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from sparsity_atlas.kernels.cpu import bits_of, in_parts
from sparsity_atlas.kernels.definition import INFINITIES

if TYPE_CHECKING:
    from torch import Tensor

_compiled = njit(nogil=True, cache=True, error_model="numpy")
# SplitMix64's output function, see `patterns`. A signed number beside these would make float64 of both.
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11, _0 = (np.uint64(bits) for bits in (30, 27, 31, 11, 0))


def applied(mask: Tensor, values: Tensor, onto: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.by_mask`, for tensors [rows, width]."""
    rows, width = values.shape
    values, onto = values.contiguous(), onto.contiguous()
    out = torch.empty_like(onto)
    zeros = np.empty(rows, dtype=np.int64)
    finite = np.empty(rows, dtype=np.bool_)
    kept = mask.contiguous().numpy()
    arguments = (kept, *map(bits_of, (values, onto, out)), zeros, finite)
    in_parts(_apply, (*arguments, *_numbers(values)), rows, width)
    return out, torch.from_numpy(zeros), torch.from_numpy(finite)


def largest_of_groups(values: Tensor, size: int, kept: int) -> Tensor:
    """As in `patterns`."""
    mask = np.empty(values.shape, dtype=np.bool_)
    arguments = (bits_of(values.contiguous()), mask, size, kept, *_numbers(values))
    in_parts(_largest, arguments, *values.shape)
    return torch.from_numpy(mask)


def drawn(values: Tensor, codes: Tensor, bound: int) -> Tensor:
    """The draws of `patterns` that lie below bound / 2^53.

    Args:
        values: [rows, width].
        codes: int64 [width], of `patterns.codes`.
        bound: from 0 to 2^53.
    """
    mask = np.empty(values.shape, dtype=np.bool_)
    unsigned = codes.numpy().view(np.uint64)
    arguments = (bits_of(values.contiguous()), mask, unsigned, np.uint64(bound))
    in_parts(_draw, (*arguments, _numbers(values)[1]), *values.shape)
    return torch.from_numpy(mask)


def _numbers(values: Tensor) -> tuple[int, int]:
    """What leaves the sign out of a bit pattern, and the pattern of infinity."""
    return (0x7FFFFFFF if values.element_size() == 4 else 0x7FFF), INFINITIES[values.dtype]


@_compiled
def _apply(mask, values, onto, out, zeros, finite, magnitude, infinity, first, last):
    for row in range(first, last):
        count, largest = 0, 0
        for column in range(values.shape[1]):
            size = values[row, column] & magnitude
            kept = mask[row, column]
            count += (not kept) | (size == 0)
            largest = max(largest, size)
            out[row, column] = onto[row, column] if kept else 0
        zeros[row] = count
        finite[row] = largest < infinity


@_compiled
def _largest(values, mask, size, kept, magnitude, infinity, first, last):
    width = values.shape[1]
    # Beyond both ends lies what is in no group.
    keys = np.zeros(width + 2 * size, dtype=np.int32)
    own = keys[size : size + width]
    ahead = np.empty(width, dtype=np.int32)
    place = (np.arange(width) % size).astype(np.int32)
    for row in range(first, last):
        for column in range(width):
            # NaN alike, whatever its bits.
            own[column] = min(values[row, column] & magnitude, infinity + 1)
        ahead[:] = 0
        # Distance by distance, so that neighbours are looked at side by side.
        for distance in range(1, size):
            _count(
                own,
                keys[size - distance : size - distance + width],
                keys[size + distance : size + distance + width],
                place,
                np.int32(distance),
                np.int32(size - distance),
                ahead,
            )
        for column in range(width):
            mask[row, column] = ahead[column] < kept


@_compiled
def _count(own, before, after, place, first, end, ahead):
    """Add which of two neighbours at one distance come before each entry."""
    for column in range(len(own)):
        left = np.int32(before[column] >= own[column]) & np.int32(place[column] >= first)
        right = np.int32(after[column] > own[column]) & np.int32(place[column] < end)
        ahead[column] += left + right


@_compiled
def _hash(number):
    number = (number ^ (number >> _30)) * _FIRST
    number = (number ^ (number >> _27)) * _SECOND
    return number ^ (number >> _31)


@_compiled
def _draw(values, mask, codes, bound, infinity, first, last):
    width = values.shape[1]
    for row in range(first, last):
        token = _0
        for column in range(width):
            value = values[row, column]
            token += codes[column] if (value > 0) & (value <= infinity) else _0
        token = _hash(token)
        for column in range(width):
            mask[row, column] = (_hash(token + codes[column]) >> _11) < bound
