"""What is counted: a vector of each place at a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsity_atlas.sites.part import sites_of
from sparsity_atlas.terms import ATTENTION, FFN, MASKED, TENSORS, PlaceKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_atlas.criteria.base import Criterion
    from sparsity_atlas.sites.part import Part, Routing


@dataclass(frozen=True)
class Slot:
    """One counted vector: a tensor of one part of a layer.

    Attributes:
        key: where it is.
        width: its entries.
        outputs: weights that each of them meets.
        routing: how its tokens are spread over experts, if they are.
        of_experts: whether each of these has entries of its own, and does not share them with others.
    """

    key: PlaceKey
    width: int
    outputs: int
    routing: Routing | None = None
    of_experts: bool = False

    @property
    def neurons(self) -> int:
        """Entries that the vectors of all tokens have places for: of experts those of all of them."""
        if self.routing is None or not self.of_experts:
            return self.width
        return self.routing.experts * self.routing.width

    def columns(self) -> list[str | int]:
        """What stands of it in the header of a sample table: tensor, layer, width; the part if it has to."""
        # Of what a dense layer holds, the tensor's name tells the part.
        part = [] if self.key.part in (ATTENTION, FFN) else [self.key.part]
        return [self.key.tensor, self.key.layer, self.width, *part]


def slots_of(
    parts: Sequence[Part], site: str | None, criterion: Criterion | None = None
) -> list[Slot]:
    """What is counted in the order of a forward pass.

    Args:
        parts: of one model.
        site: where; None: at every site.
        criterion: by which the site is sparsified.
    """
    if criterion is not None and criterion.differs_by_expert:
        parts = [part.apart() for part in parts]
    sites = sites_of(parts) if site is None else [site]
    tensors = {name for one in sites for name in TENSORS[one]}
    return [
        Slot(
            PlaceKey(part.layer, part.name, name),
            part.size(name),
            part.outputs(name),
            part.routing(name),
            part.routing(name) is not None and not part.rows_are_tokens(name),
        )
        for part in parts
        for name in MASKED
        if name in tensors and name in part.tensors
    ]
