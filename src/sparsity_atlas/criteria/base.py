"""What a criterion is: the rule that decides which entries of a vector are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Criterion(ABC):
    """Decides, for each token's vector by itself, which entries are kept.

    A criterion is one file with one subclass. The definition is plain torch and exact: it is the
    reference for every faster path. Its one number, the level, lies in [lowest, highest].
    Parameters of the criterion are the keyword arguments of `__init__`.

    Rules that every criterion keeps: thresholds look at one row only, never across a batch; ties at
    a threshold are kept; NaN and infinities need no care here, they are reported by the caller.
    """

    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    dense_level: ClassVar[float]
    """The level at which nothing changes; sparsity grows with the distance from it."""
    coarse_levels: ClassVar[tuple[str, ...]]
    """First levels of a search, from mild to harsh, spread over the useful range."""

    @abstractmethod
    def mask(self, values: Tensor, level: float) -> Tensor:
        """Return which entries are kept.

        Args:
            values: [rows, width], one row a token; any floating type.
            level: in [lowest, highest].

        Returns:
            bool [rows, width], True where the entry is kept.
        """
