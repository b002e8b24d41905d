"""A vector of each token, and which of its entries are kept, as the products want it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from sparsity_atlas import kernels
from sparsity_atlas.kernels.definition import Threshold

if TYPE_CHECKING:
    from torch import Tensor


# Of a vector's entries, that are taken to be dropped where nobody says how many.
LIKELY = 0.5


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
        expected: share of the entries that is likely dropped; it chooses how a product is cut, and nothing
            that is kept.
    """

    values: Tensor
    keep: Keep = Keep.ALL
    constants: Tensor | None = None
    rule: Threshold | None = None
    expected: float = LIKELY

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

    def found(self) -> Vector:
        """The same with zeros where entries are dropped, if that takes a search."""
        if self.rule is None:
            return self
        return found_first(self.rule, self.values, self.expected)


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


def prepared(
    rule: Threshold | None, values: Tensor, *, fused: bool, expected: float = LIKELY
) -> Vector:
    """The vector as a rule masks it: what the product can find itself is left to it, else it is found first.

    Args:
        rule: with its tensors on the device of `values`; None keeps everything.
        values: [tokens, width].
        fused: whether the product can compare.
        expected: share of the entries that is likely dropped.
    """
    if rule is None:
        return Vector(values, expected=0.0)
    made = fused_of(rule, values, expected) if fused else None
    return made or found_first(rule, values, expected)


def fused_of(rule: Threshold, values: Tensor, expected: float) -> Vector | None:
    """The vector that a product which can compare masks itself; None where that takes a step before it.

    Args:
        rule: as of `prepared`.
        values: likewise.
        expected: likewise.
    """
    if looks_at_entries(rule):
        return Vector(values, Keep.REACHES, rule.constants, expected=expected)
    if rule.kind == "share" and rule.power == 1 and rule.weights is None and rule.amount < 1:
        return Vector(values, Keep.SHARE, rule=rule, expected=expected)
    return None


def found_first(rule: Threshold, values: Tensor, expected: float) -> Vector:
    """The vector with zeros where the rule drops entries."""
    kept = kernels.masked(rule, values, values).out
    return Vector(kept, Keep.NONZERO, expected=expected)
