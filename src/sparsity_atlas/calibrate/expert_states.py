"""States of routed experts: of all rows of a layer, and of each expert that has enough rows of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsity_atlas.criteria.place import Place, SpreadPlace, places, state_name

if TYPE_CHECKING:
    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.place import Sample, State
    from sparsity_atlas.sites.find import Part


class PairSample:
    """A `place.Sample` of pairs of a token and one of its experts."""

    def __init__(self, sample: Sample, place: Place, pairs: Tensor, each: int) -> None:
        """Choose pairs.

        Args:
            sample: of all experts of a layer: of some tensors a row for each token, of the others a row for
                each of its pairs, n · K + k.
            place: whose it is.
            pairs: int, by these numbers.
            each: K.
        """
        self._sample = sample
        self._place = place
        self._pairs = pairs
        self._each = each

    def read(self, tensor: str) -> Tensor:
        """One tensor: float32 [pairs, width]."""
        values = self._sample.read(tensor)
        pairs = self._pairs.to(values.device)
        return values[pairs // self._each if self._place.part.rows_are_tokens(tensor) else pairs]


class _Kept:
    """A sample whose tensors are read once."""

    def __init__(self, sample: Sample) -> None:
        self.read = cache(sample.read)


def states_of(
    criterion: Criterion, place: Place, sample: Sample, index: Tensor
) -> dict[str, State]:
    """What a criterion finds at a place of routed experts.

    Args:
        criterion: one that is calibrated.
        place: the tensor.
        sample: of all experts; see `PairSample`.
        index: int [tokens, K], the experts of each token of it.

    Returns:
        Under the place's `state_name` what serves all of its experts: of all rows, as they come. With
        `calibration: per_expert`, under the names of its experts what serves these: of their own rows,
        where they have at least `expert_rows` of them.
    """
    kept, each = _Kept(sample), index.shape[-1]
    of_row = index.flatten().long()
    if criterion.looks_at_weights:
        pairs = torch.arange(len(of_row))
        spread = SpreadPlace(place.part, place.tensor, of_row.to(place.device))
        state = criterion.calibrate(spread, PairSample(kept, place, pairs, each))
    else:
        state = criterion.calibrate(place, kept)
    states = {state_name(place.key): state}
    for number, expert in enumerate(place.experts if criterion.calibration == "per_expert" else ()):
        own = (of_row == number).nonzero().flatten()
        if len(own) >= criterion.expert_rows:
            states[state_name(place.key, number)] = criterion.calibrate(
                expert, PairSample(kept, place, own, each)
            )
    return states


def served_by_layer(
    parts: Sequence[Part], site: str, states: Mapping[str, State]
) -> dict[str, list[int]]:
    """The experts that have no state of their own, by the place's `state_name`."""
    return {
        state_name(place.key): [
            number
            for number in range(len(place.experts))
            if state_name(place.key, number) not in states
        ]
        for place in places(parts, site)
        if place.experts
    }
