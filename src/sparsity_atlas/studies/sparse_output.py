"""An output of a layer with a criterion at its site, and how far it is from the dense one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.sites.find import Part, Vectors
    from sparsity_atlas.sites.part import Given
    from sparsity_atlas.terms import PlaceKey

    Look = Callable[[PlaceKey, Tensor], None]


class Output(NamedTuple):
    """An output of a layer that a site changes: the part's, and what the site is to it."""

    part: Part
    site: str


def outputs_at(parts: Iterable[Part], site: str) -> list[Output]:
    """The outputs that a site changes: of attention each tensor's maps for themselves, of an FFN its own."""
    return [Output(part, own) for part in parts for own in part.within(site)]


def sparse_output(
    output: Output,
    tensors: Given,
    rules: Mapping[PlaceKey, Criterion],
    level: float,
    length: int = 1,
    look: Look | None = None,
) -> tuple[Tensor, int, int]:
    """`Part.run` with a criterion at the output's site.

    Args:
        output: of a layer.
        tensors: what `Part.sources` names, [tokens, width] each.
        rules: the criterion as it is bound to each place.
        level: its number.
        length: tokens of a sequence; whole sequences stand one after the other.
        look: is shown what is kept and not zero at each place whose rows are whole sequences: bool
            [sequences, length, width].

    Returns:
        output [tokens, outputs], zeros and entries at the site.
    """
    from sparsity_atlas.criteria.expert_rules import ExpertRules
    from sparsity_atlas.sparsify.attach import dropping
    from sparsity_atlas.sparsify.step_masks import left

    zeros = entries = 0

    def drop(vectors: Vectors, onto: Tensor) -> Tensor:
        nonlocal zeros, entries
        values = vectors.values
        by_token = vectors.part.rows_are_tokens(vectors.tensor)
        shape = (-1, length, values.shape[-1]) if by_token else values.shape
        dropped = dropping(rules[vectors.key], level)
        seen = values.view(shape)
        written = seen if onto is values else onto.view(shape)
        masked = dropped(seen, written, vectors.spread)
        zeros += int(masked.zeros.sum())
        if look is not None and by_token:
            look(vectors.key, left(dropped, masked, replace(vectors, values=seen), written))
        entries += values.numel()
        return masked.out.view(values.shape)

    differ = any(isinstance(rule, ExpertRules) for rule in rules.values())
    part = output.part.apart() if differ else output.part
    return part.run(tensors, output.site, drop), zeros, entries


def relative(dense: Tensor, sparse: Tensor) -> tuple[float, int]:
    """Sum over tokens of ‖dense − sparse‖ / ‖dense‖, and of how many; an output of zeros has none."""
    dense = dense.float()
    norm = dense.norm(dim=-1)
    errors = (sparse.float() - dense).norm(dim=-1)[norm > 0] / norm[norm > 0]
    return float(errors.double().sum()), len(errors)
