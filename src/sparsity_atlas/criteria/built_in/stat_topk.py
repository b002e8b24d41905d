"""Statistical top-k: a threshold from a row's mean and deviation, without a sort."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, get_args

import torch

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.kernels.definition import decimal

if TYPE_CHECKING:
    from torch import Tensor

Of = Literal["magnitude", "signed"]


class StatTopK(Criterion):
    """Keep s ≥ mean(s) + std(s) · Φ⁻¹(1 − level), where s is |v| of the row, or v itself.

    The statistical top-k of Spark Transformer (arXiv 2506.06644), and of the gates of Gemma 3n: were
    s normally distributed, a share `level` would be kept. It is not, so induced sparsity is what it
    turns out to be; top-k is the exact rule. The deviation is the population's, as in these models.

    `of` says what s is: `magnitude`, or `signed`, which keeps what is large and positive, as these
    models do before the nonlinearity. What is kept keeps its value: they subtract the threshold
    from it. level = 1 changes nothing, level = 0 drops the whole row; in a row without a deviation
    all tie with the threshold, and are kept.
    """

    dense_level = 1.0
    coarse_levels = ("0.8", "0.6", "0.4", "0.2")

    def __init__(self, of: Of = "magnitude") -> None:
        if of not in get_args(Of):
            raise ValueError(f"of: expected {' or '.join(get_args(Of))}, found {of!r}")
        self.of = of

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        if level in (0, 1):
            return torch.full_like(values, bool(level), dtype=torch.bool)
        # In float64 sums are off by so little that no batch moves an entry over its threshold.
        scores = (values.abs() if self.of == "magnitude" else values).double()
        deviation, mean = _moments(scores)
        return scores >= mean + deviation * NormalDist().inv_cdf(float(1 - decimal(level)))


def _moments(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each row, [rows, 1]; both exact for a row of equal entries."""
    first = scores[:, :1]
    rest = scores - first
    return rest.std(-1, correction=0, keepdim=True), first + rest.mean(-1, keepdim=True)
