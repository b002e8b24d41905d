"""ARM: a control that does the opposite of sparsifying, near-zero gates drawn anew and larger."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import torch

from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.criteria.built_in.random import checked_seed, salt_of
from sparsity_atlas.kernels.patterns import draws

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place

# What makes the median absolute deviation a standard deviation where entries are normal.
KAPPA = 1.4826
# Least and largest share of a token's entries that are drawn anew.
LEAST, MOST = 0.02, 0.25
# Quantile that positive entries are drawn up to.
HIGH = 0.995
# Of smaller entries nothing can be told of the other factor.
TINY = 1e-30


class Arm(Criterion):
    """Draw near-zero gates anew from the range of their sign (ARM, arXiv 2510.01032).

    ε = c · 1.4826 · MAD(|g|) of the token's gate, with c the level (the authors' code has 0.13); of the share
    of entries below ε, but at least 2 and at most 25 %, so many with the smallest |g| are drawn anew,
    uniformly: positive ones between 0 and the 99.5 % quantile of g, negative ones between min g and 0. Exact
    zeros stay. All of it is of one token, where that code looks at all tokens of a batch, and the draws are
    a hash of the seed, the place and the signs of the token's own vector, as of `random`.

    What is drawn anew counts as dropped: induced sparsity is the share of these, and of exact zeros.
    The authors do this in the first layer alone: `layers: [0]` in the run block. level = 0 changes nothing.
    """

    sites = ("gate",)
    highest = 100.0
    dense_level = 0.0
    coarse_levels = ("0.05", "0.13", "0.3", "1")
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
        """See `Criterion.mask`; entries that are drawn anew are not kept."""
        if level == 0:
            return torch.ones_like(values, dtype=torch.bool)
        sizes = values.double().abs()
        middle = _median(sizes)
        near = level * KAPPA * _median((sizes - middle).abs())
        share = (sizes < near).double().mean(-1, keepdim=True).clamp(LEAST, MOST)
        count = (share * values.shape[-1]).floor().long()
        largest = sizes.sort(-1).values.gather(-1, (count - 1).clamp(min=0))
        return (sizes > largest) | (count == 0) | (sizes < TINY)

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor | None:
        """See `Criterion.replace`."""
        if level == 0 or mask.all():
            return None
        gate = values.double()
        ranked = gate.sort(-1).values
        place = min(int(HIGH * gate.shape[-1]), gate.shape[-1] - 1)
        high, low = ranked[..., place, None].clamp(min=0), ranked[..., :1].clamp(max=0)
        drawn = draws(values, self._salt) * torch.where(gate > 0, high, low)
        # i = u ⊙ g has the new gate as a multiple of the old one.
        ratio = torch.where(mask, 1.0, drawn / torch.where(mask, 1.0, gate))
        return (written.double() * ratio).to(written.dtype)


def _median(sizes: Tensor) -> Tensor:
    """Of each row [rows, 1]; of an even number of entries the lower one in the middle, as torch has it."""
    return sizes.median(-1, keepdim=True).values
