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
    """Which entries a product keeps: all, those that are not zero, or those that reach a constant."""

    ALL = 0
    NONZERO = 1
    REACHES = 2


@dataclass(frozen=True, eq=False)
class Vector:
    """x [tokens, width] with its mask.

    Attributes:
        values: x; of `NONZERO` with zeros where entries are dropped.
        keep: how the mask is found in the product.
        constants: float32 [1] or [width] that |x| must reach, of `REACHES`.
    """

    values: Tensor
    keep: Keep = Keep.ALL
    constants: Tensor | None = None

    @property
    def by_channel(self) -> bool:
        """Whether each channel has a constant of its own."""
        return self.constants is not None and len(self.constants) > 1

    def masked(self) -> Tensor:
        """x ⊙ m."""
        if self.keep is not Keep.REACHES:
            return self.values
        rule = Threshold("fixed", constants=self.constants)
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
    if fused and looks_at_entries(rule):
        return Vector(values, Keep.REACHES, rule.constants)
    return Vector(kernels.masked(rule, values, values).out, Keep.NONZERO)
