"""Random: the control, which looks at no magnitude."""

from __future__ import annotations

import copy
import zlib
from typing import TYPE_CHECKING, Self

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.patterns import drawn

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
        return drawn(values, self._salt, level)


def salt_of(seed: int, place: Place) -> int:
    """What tells the draws of a place from those of others."""
    return seed + (zlib.crc32(f"{place.tensor}.{place.layer}".encode()) << 31)


def checked_seed(seed: int) -> int:
    """A seed of draws.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise ValueError(f"seed: expected a whole number from 0 to 2^31 - 1, found {seed!r}")
    return seed
