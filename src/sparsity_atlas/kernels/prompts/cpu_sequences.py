"""Sums over entries and tokens of sequences on the CPU, compiled with Numba: what `sequence_sums` defines.

All compiled functions stand in this one file, as in `cpu_row` and for its reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from sparsity_atlas.kernels.cpu import bits_of, in_parts
from sparsity_atlas.kernels.prompts.order import LANES, RUN, first_of

if TYPE_CHECKING:
    from torch import Tensor

# Without `fastmath` no addition is moved, and no product joined with one.
_compiled = njit(nogil=True, cache=True, error_model="numpy")
_LANES, _RUN = LANES, RUN
# Neurons whose sums stay in the first cache.
_BLOCK = 1024


def energies(values: Tensor, counted: Tensor) -> Tensor:
    """As in `sequence_sums`."""
    rows = bits_of(values.contiguous().flatten(0, 1))
    found = np.empty(len(rows), dtype=np.float64)
    chosen = counted.contiguous().flatten().numpy()
    in_parts(_energies, (rows, chosen, values.dtype == torch.float16, found), *rows.shape)
    return torch.from_numpy(found).view(counted.shape)


def over_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """As in `sequence_sums`."""
    batch, tokens, width = values.shape
    sums = np.zeros((batch, width), dtype=np.float64)
    arguments = (
        bits_of(values.contiguous()),
        weights.contiguous().numpy(),
        first_of(weights).numpy(),
    )
    in_parts(_over_tokens, (*arguments, values.dtype == torch.float16, sums), width, batch * tokens)
    return torch.from_numpy(sums)


def spread(kept: Tensor, whole: Tensor) -> Tensor:
    """As in `sequence_sums`."""
    batch, tokens, width = *whole.shape, kept.shape[-1]
    mask = np.empty((batch, tokens, width), dtype=np.bool_)
    in_parts(
        _spread,
        (kept.contiguous().numpy(), whole.contiguous().numpy(), mask),
        tokens,
        batch * width,
    )
    return torch.from_numpy(mask)


def leave_whole(whole: Tensor, values: Tensor, onto: Tensor, out: Tensor, zeros: Tensor) -> None:
    """As in `sequence_sums`."""
    rows = (bits_of(one.contiguous().flatten(0, 1)) for one in (values, onto, out))
    magnitude = 0x7FFFFFFF if values.element_size() == 4 else 0x7FFF
    arguments = whole.contiguous().flatten().numpy(), *rows, zeros.view(-1).numpy(), magnitude
    in_parts(_leave_whole, arguments, whole.numel(), values.shape[-1])


@_compiled
def _load(values, half, key, score):
    """Magnitudes of numbers of whatever type into `score`, of which `key` is a view."""
    if values.itemsize == 4:
        for j in range(len(values)):
            key[j] = values[j] & 0x7FFFFFFF
    elif half:
        # As in `cpu_row`; here NaN stays NaN.
        for j in range(len(values)):
            key[j] = (np.int32(values[j]) & 0x7FFF) << 13
        for j in range(len(values)):
            score[j] *= np.float32(2.0**112)
        for j in range(len(values)):
            size = np.int32(values[j]) & 0x7FFF
            if size >= 0x7C00:
                key[j] = 0x7F800000 + (size - 0x7C00)
    else:
        for j in range(len(values)):
            key[j] = (np.int32(values[j]) & 0x7FFF) << 16


@_compiled
def _energies(values, counted, half, found, first, last):
    width = values.shape[1]
    score = np.empty(_LANES, dtype=np.float32)
    key = score.view(np.int32)
    lanes = np.empty(_LANES, dtype=np.float64)
    for row in range(first, last):
        found[row] = 0
        if not counted[row]:
            continue
        lanes[:] = 0
        for start in range(0, width, _LANES):
            count = min(_LANES, width - start)
            _load(values[row, start : start + count], half, key, score)
            for j in range(count):
                wide = np.float64(score[j])
                lanes[j] += wide * wide
        count = _LANES
        while count > 1:
            count //= 2
            for j in range(count):
                lanes[j] = lanes[2 * j] + lanes[2 * j + 1]
        found[row] = lanes[0]


@_compiled
def _over_tokens(values, weights, begins, half, sums, first, last):
    """For the neurons [first, last)."""
    score = np.empty(_BLOCK, dtype=np.float32)
    key = score.view(np.int32)
    run = np.empty(_BLOCK, dtype=np.float64)
    tokens = values.shape[1]
    for start in range(first, last, _BLOCK):
        count = min(_BLOCK, last - start)
        for row in range(values.shape[0]):
            own = sums[row, start : start + count]
            for begin in range(begins[row], tokens, _RUN):
                run[:] = 0
                for token in range(begin, min(begin + _RUN, tokens)):
                    weight = weights[row, token]
                    if weight == 0:
                        continue
                    _load(values[row, token, start : start + count], half, key, score)
                    for j in range(count):
                        wide = np.float64(score[j])
                        run[j] += wide * wide * weight
                for j in range(count):
                    own[j] += run[j]


@_compiled
def _spread(kept, whole, mask, first, last):
    """For the tokens [first, last)."""
    for row in range(mask.shape[0]):
        for token in range(first, last):
            if whole[row, token]:
                mask[row, token] = True
            else:
                mask[row, token] = kept[row, min(token, kept.shape[1] - 1)]


@_compiled
def _leave_whole(whole, values, onto, out, zeros, magnitude, first, last):
    for row in range(first, last):
        if whole[row]:
            count = 0
            for column in range(values.shape[1]):
                count += (values[row, column] & magnitude) == 0
                out[row, column] = onto[row, column]
            zeros[row] = count
