"""Masks as bits, eight entries a byte: kept, joined and counted on the device that they are on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

# Bits of a word, which rows are filled up to.
WORD = 64


def words(width: int) -> int:
    """Words that a row of so many entries takes."""
    return -(-width // WORD)


def packed(mask: Tensor) -> Tensor:
    """A mask, bool [..., width], as int64 [..., words]."""
    if mask.device.type != "cpu":
        return packed_by_torch(mask)
    return torch.from_numpy(np.packbits(_whole(mask).numpy(), -1, "little")).view(torch.int64)


def packed_by_torch(mask: Tensor) -> Tensor:
    """As `packed`, on any device."""
    values = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = _whole(mask).view(torch.uint8).unflatten(-1, (-1, 8))
    found: Tensor = (bits * values).sum(-1, dtype=torch.uint8).view(torch.int64)
    return found


def _whole(mask: Tensor) -> Tensor:
    """Rows filled up to whole words."""
    spare = words(mask.shape[-1]) * WORD - mask.shape[-1]
    return F.pad(mask, (0, spare)) if spare else mask.contiguous()


def ones(bits: Tensor) -> Tensor:
    """How many bits of each row are set: int64 [...] of int64 [..., words]."""
    if bits.device.type != "cpu":
        return ones_by_torch(bits)
    # Of a signed number numpy counts the bits of the magnitude.
    found = np.bitwise_count(bits.numpy().view(np.uint64))
    return torch.from_numpy(found.sum(-1, dtype=np.int64))


def ones_by_torch(bits: Tensor) -> Tensor:
    """As `ones`, on any device."""
    # Sums of two, four and eight neighbours, and then of a word's bytes, in its highest one.
    found = bits - ((bits >> 1) & 0x5555555555555555)
    found = (found & 0x3333333333333333) + ((found >> 2) & 0x3333333333333333)
    found = (found + (found >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((found * 0x0101010101010101) >> 56).sum(-1)
