"""A vector of each token, and which of its entries are kept, as the products want it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from sparsity_atlas import kernels
from sparsity_atlas.kernels.definition import Threshold

if TYPE_CHECKING:
    from torch import Tensor


class Keep(IntEnum):
    """Which entries a product keeps: all, those that are not zero, those that reach a constant, or those that
    hold a share of the row's mass."""

    ALL = 0
    NONZERO = 1
    REACHES = 2
    SHARE = 3


@dataclass(frozen=True, eq=False)
class Vector:
    """x [tokens, width] with its mask.

    Attributes:
        values: x; of `NONZERO` with zeros where entries are dropped.
        keep: how the mask is found in the product.
        constants: float32 [1] or [width] that |x| must reach, of `REACHES`.
        rule: which share, of `SHARE`.
    """

    values: Tensor
    keep: Keep = Keep.ALL
    constants: Tensor | None = None
    rule: Threshold | None = None

    @property
    def by_channel(self) -> bool:
        """Whether each channel has a constant of its own."""
        return self.constants is not None and len(self.constants) > 1

    def masked(self) -> Tensor:
        """x ⊙ m."""
        rule = self.rule
        if self.keep is Keep.REACHES:
            rule = Threshold("fixed", constants=self.constants)
        if rule is None:
            return self.values
        return kernels.masked(rule, self.values, self.values).out


class Norm(NamedTuple):
    """What makes a vector of x: the root-mean-square norm of x + more.

    Attributes:
        more: of the shape of x; None: nothing.
        weight: [width], that the norm is multiplied by.
        eps: beside the mean square.
    """

    more: Tensor | None
    weight: Tensor
    eps: float


def looks_at_entries(rule: Threshold) -> bool:
    """Whether a rule looks at one entry by itself, so that a product can follow it on the way.

    The definition keeps a row with a NaN or an infinity whole. In a product such an entry is kept, and all
    that the row makes is NaN or infinite by it alone. Weighted scores may overflow where entries do not,
    and are left out.
    """
    return rule.kind == "fixed" and rule.weights is None


def prepared(rule: Threshold | None, values: Tensor, *, fused: bool) -> Vector:
    """The vector as a rule masks it: constants are left to the product, other thresholds are found first.

    Args:
        rule: with its tensors on the device of `values`; None keeps everything.
        values: [tokens, width].
        fused: whether the product can compare.
    """
    if rule is None:
        return Vector(values)
    made = fused_of(rule, values) if fused else None
    return made or Vector(kernels.masked(rule, values, values).out, Keep.NONZERO)


def fused_of(rule: Threshold, values: Tensor) -> Vector | None:
    """The vector whose entries a product that can compare masks itself; None where that takes a step before it."""
    if looks_at_entries(rule):
        return Vector(values, Keep.REACHES, rule.constants)
    if rule.kind == "share" and rule.power == 1 and rule.weights is None and rule.amount < 1:
        return Vector(values, Keep.SHARE, rule=rule)
    return None
