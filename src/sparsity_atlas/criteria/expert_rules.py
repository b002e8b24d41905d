"""A criterion bound to the experts of a mixture one by one, where each has weights or states of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsity_atlas.criteria.base import Criterion

if TYPE_CHECKING:
    from torch import Tensor


class ExpertRules(Criterion):
    """The rules of all experts at one place.

    Attributes:
        rules: the criterion as it is bound to each expert, by its number.
    """

    def __init__(self, rules: Sequence[Criterion]) -> None:
        self.rules = tuple(rules)

    @property
    def differs_by_expert(self) -> bool:
        """See `Criterion.differs_by_expert`."""
        return True

    def mask(self, values: Tensor, level: float) -> Tensor:
        """Rows do not say which expert they belong to: see `sparsify.each_expert`."""
        raise NotImplementedError("each expert has a rule of its own")


def each(rule: Criterion) -> list[tuple[int | None, Criterion]]:
    """The rules of all experts with their numbers; one without, where all rows have the same rule."""
    return list(enumerate(rule.rules)) if isinstance(rule, ExpertRules) else [(None, rule)]
