"""Masks that follow from no threshold: the largest of each group of neighbours, and draws.

Their definitions in plain torch, and the way to the kernels that give the same masks faster. Values are
[rows, width]; masks are bool of that shape, True where kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from sparsity_atlas import kernels

if TYPE_CHECKING:
    from torch import Tensor

# The CPU's kernel compares each entry of a group with each other one.
LARGEST_GROUP = 64
DRAW_BITS = 53  # of a draw, which float64 holds exactly


def largest_of_groups(values: Tensor, size: int, kept: int) -> Tensor:
    """Keep the `kept` largest |v| of each `size` entries that follow each other.

    Of ties the first are kept, never more than `kept`. A last group that is not full is filled up with
    zeros. NaN counts as larger than all numbers.
    """
    module = kernels.masks_of(values) if size <= LARGEST_GROUP else None
    if module is not None:
        return module.largest_of_groups(values, size, kept)
    rows, width = values.shape
    padded = F.pad(values.abs(), (0, -width % size))
    groups = padded.view(rows, -1, size)
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    ranked = torch.zeros_like(groups, dtype=torch.bool)
    ranked[..., :kept] = True
    mask = torch.empty_like(ranked).scatter_(-1, order, ranked)
    return mask.view(rows, -1)[:, :width]


def drawn(values: Tensor, salt: int, share: float) -> Tensor:
    """Keep what `draws` puts below `share`, in [0, 1]."""
    module = kernels.masks_of(values)
    if module is None:
        return draws(values, salt) < share
    # Both sides times 2^53, which is exact: of whole numbers, those below the next whole one.
    return module.drawn(values, codes(values, salt), math.ceil(share * 2.0**DRAW_BITS))


def draws(values: Tensor, salt: int) -> Tensor:
    """A number in [0, 1) for each entry: float64 of the values' shape, a hash of salt, channel and row.

    Of a row the signs count: last bits of a value depend on the batch that it was computed in.
    """
    own = codes(values, salt)
    token = torch.where(values > 0, own, 0).sum(-1, keepdim=True)
    draw = _hash(_hash(token) + own)
    return _shift(draw, 64 - DRAW_BITS).double() * 2.0**-DRAW_BITS


def codes(values: Tensor, salt: int) -> Tensor:
    """A number for each channel: int64 [width]."""
    return _hash(torch.arange(values.shape[-1], device=values.device) + salt)


def _hash(numbers: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014) on int64 bits."""
    numbers = (numbers ^ _shift(numbers, 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ _shift(numbers, 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ _shift(numbers, 31)


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
