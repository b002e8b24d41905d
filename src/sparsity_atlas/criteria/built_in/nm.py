"""n:m: keep n of every m neighbouring entries, the pattern that sparse tensor cores take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import decimal
from sparsity_atlas.kernels.patterns import largest_of_groups

if TYPE_CHECKING:
    from torch import Tensor


class NM(Criterion):
    """Keep the n = ⌊level · m⌋ largest |v| of each m = `group` entries that follow each other.

    2:4, 4:8 and 16:32 are level 0.5 of groups of 4, 8 and 32 (arXiv 2509.22166 compares them on
    activations). Never more than n, which the hardware could not hold: of ties the first are kept.
    A last group that is not full is filled up with zeros. level = 1 changes nothing.
    """

    dense_level = 1.0
    coarse_levels = ("0.75", "0.5", "0.25")

    def __init__(self, group: int = 4) -> None:
        if not isinstance(group, int) or isinstance(group, bool) or group < 2:
            raise ValueError(f"group: expected a whole number of at least 2, found {group!r}")
        self.group = group

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        # The decimal that the user wrote, as in top-k.
        kept = math.floor(decimal(level) * self.group)
        return largest_of_groups(values, self.group, kept)
