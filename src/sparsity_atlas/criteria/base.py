"""What a criterion is: the rule that decides which entries of a vector are kept."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from torch import Tensor

from sparsity_atlas.threshold import Threshold


class Criterion(ABC):
    """Decides, for each token's vector by itself, which entries are kept.

    A criterion is one file with one subclass. Its one number, the level, lies in [lowest, highest].
    Parameters of the criterion are the keyword arguments of `__init__`. It says what it does in one
    of two ways:

    - `threshold` returns a `Threshold`: a share of the mass, a rank, a share of the largest, or fixed
      constants, of scores that may be weighted by channel. The plain torch definition and the compiled
      kernels both follow from it.
    - `mask` computes the mask in plain torch, exactly. It then is the only path, on every device.

    A criterion whose numbers differ from layer to layer (calibrated constants, weights taken from the
    model) overrides `at`, which is asked once for each layer and tensor before anything runs.

    Rules that every criterion keeps: thresholds look at one row only, never across a batch; ties at
    a threshold are kept; NaN and infinities need no care here, they are reported by the caller.
    """

    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    dense_level: ClassVar[float]
    """The level at which nothing changes; sparsity grows with the distance from it."""
    coarse_levels: ClassVar[tuple[str, ...]]
    """First levels of a search, from mild to harsh, spread over the useful range."""

    def at(self, layer: int, tensor: str) -> Criterion:
        """The criterion of one layer and tensor (`input`, `up`, `gate`, `intermediate`).

        A calibrated criterion returns one that holds the constants or weights of that place; by
        default every place has the same criterion.
        """
        return self

    def threshold(self, level: float, width: int) -> Threshold:
        """The rule at a level.

        Args:
            level: in [lowest, highest].
            width: entries of a row.
        """
        raise NotImplementedError

    def mask(self, values: Tensor, level: float) -> Tensor:
        """Return which entries are kept.

        Args:
            values: [rows, width], one row a token; float32, bfloat16 or float16.
            level: in [lowest, highest].

        Returns:
            bool [rows, width], True where the entry is kept.
        """
        return self.threshold(level, values.shape[-1]).to(values.device).mask(values)


def declares_threshold(criterion: Criterion) -> bool:
    """Whether `threshold` says all that the criterion does."""
    kind = type(criterion)
    return kind.mask is Criterion.mask and kind.threshold is not Criterion.threshold
