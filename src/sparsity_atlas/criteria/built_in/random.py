"""Random: the control, which looks at no magnitude."""

from __future__ import annotations

import copy
import zlib
from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.base import Criterion

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place


class Random(Criterion):
    """Keep each entry with probability `level`, independently of all others.

    The draw is a hash of the seed, the place, the channel and the signs of the token's own vector:
    it differs from token to token, and comes out the same in any batch and after any resume. A
    level keeps what a lower one keeps. level = 1 changes nothing.
    """

    dense_level = 1.0
    coarse_levels = ("0.98", "0.9", "0.75", "0.5")
    looks_at_weights = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = checked_seed(seed)
        self._salt = seed

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = copy.copy(self)
        bound._salt = salt_of(self.seed, place)
        return bound

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        return draws(values, self._salt) < level


def salt_of(seed: int, place: Place) -> int:
    """What tells the draws of a place from those of others."""
    return seed + (zlib.crc32(f"{place.tensor}.{place.layer}".encode()) << 31)


def draws(values: Tensor, salt: int) -> Tensor:
    """A number in [0, 1) for each entry, the same in any batch: float64 of the values' shape."""
    channels = torch.arange(values.shape[-1], device=values.device)
    codes = _hash(channels + salt)
    # The signs: last bits of a value depend on the batch that it was computed in.
    token = torch.where(values > 0, codes, 0).sum(-1, keepdim=True)
    draw = _hash(_hash(token) + codes)
    return _shift(draw, 11).double() * 2.0**-53


def checked_seed(seed: int) -> int:
    """A seed of draws.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise ValueError(f"seed: expected a whole number from 0 to 2^31 - 1, found {seed!r}")
    return seed


def _hash(numbers: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014) on int64 bits."""
    numbers = (numbers ^ _shift(numbers, 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ _shift(numbers, 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ _shift(numbers, 31)


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
