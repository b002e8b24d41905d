"""What a model does to a map's output before it counts as a factor: bounds, an offset, a cut of its tail."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Shaping:
    """Bounds first, then the cut, then the offset; by itself it changes nothing.

    Attributes:
        low: smallest value that is let through, larger than all else it stands for (DeepSeek-V4, MiniMax-M3).
        high: largest value.
        cut: k of the statistical top-k of Gemma 3n: max(0, v − mean − k · std) of a row v, where std is that
            of the row itself, not of what it may be a sample of. A statistic of one token's row.
        plus: what is added at last.
    """

    low: float | None = None
    high: float | None = None
    cut: float | None = None
    plus: float = 0.0

    def __call__(self, values: Tensor) -> Tensor:
        """Values [..., d_ff], shaped; the same tensor where nothing is to be done."""
        if self.low is not None or self.high is not None:
            values = values.clamp(self.low, self.high)
        if self.cut is not None:
            spread = values.std(-1, keepdim=True, unbiased=False)
            values = (values - (values.mean(-1, keepdim=True) + spread * self.cut)).relu()
        return values + self.plus if self.plus else values

    def describe(self) -> dict[str, Any]:
        """As JSON: what differs from no change; a bound of zero does (ReLU on both factors)."""
        plain = asdict(PLAIN)
        return {key: value for key, value in asdict(self).items() if value != plain[key]}


PLAIN = Shaping()
