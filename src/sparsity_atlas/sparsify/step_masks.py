"""Masks of a denoising step: what a criterion left, as bits, and what two steps have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparsity_atlas.sparsify.packed_bits import ones, packed
from sparsity_atlas.sparsify.step_sums import UNIT

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.kernels import Masked
    from sparsity_atlas.sites.find import Vectors
    from sparsity_atlas.sparsify.each_expert import Drop


def left(drop: Drop, found: Masked, vectors: Vectors, onto: Tensor) -> Tensor:
    """What a drop left of some vectors: bool of their shape, False where `Masked.zeros` counts a zero."""
    values = vectors.values
    if found.mask is not None:
        return found.mask & (values != 0)
    # Where something else is written, a zero may be of that.
    out = found.out if onto is values else drop(values, values, vectors.spread).out
    return out != 0


@dataclass(frozen=True)
class StepMasks:
    """A step's masks.

    Attributes:
        bits: int64 [rows, tokens, K, words], K the experts that a token meets, 1 where there are none.
        count: int64 [rows, tokens], entries kept.
        experts: int [rows, tokens, K]; None where there are none.
    """

    bits: Tensor
    count: Tensor
    experts: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, experts: Tensor | None) -> StepMasks:
        bits = packed(rows)
        return cls(bits, ones(bits).sum(-1), experts)

    def at(self, place: Tensor | slice) -> StepMasks:
        """Of some rows."""
        experts = None if self.experts is None else self.experts[place]
        return StepMasks(self.bits[place], self.count[place], experts)

    def first(self, tokens: int) -> StepMasks:
        """Of the first tokens."""
        experts = None if self.experts is None else self.experts[:, :tokens]
        return StepMasks(self.bits[:, :tokens], self.count[:, :tokens], experts)


class KeptMasks:
    """What is kept of a slot: masks of two steps, and how often each neuron was used."""

    def __init__(self) -> None:
        self.before: StepMasks | None = None
        self.first: StepMasks | None = None
        self.block_before: Tensor | None = None  # [rows, BLOCKS, words]
        self.block_first: Tensor | None = None
        self.used: Tensor | None = None  # int32 [rows of the batch, BLOCKS, neurons]

    def take(
        self, masks: StepMasks, block: Tensor, used: Tensor, index: Tensor, batch: int
    ) -> None:
        """Take over a step."""
        self.before, self.block_before = masks, block
        if self.first is None:
            self.first, self.block_first = masks, block
            self.used = used.new_zeros(batch, *used.shape[1:])
        assert self.used is not None
        self.used[index] += used

    def shrink(self, places: Tensor) -> None:
        """Go on with some of the rows."""
        if self.before is None or self.first is None:
            return
        assert self.block_before is not None
        assert self.block_first is not None
        places = places.to(self.before.bits.device)
        self.before, self.first = self.before.at(places), self.first.at(places)
        self.block_before, self.block_first = self.block_before[places], self.block_first[places]


def overlap(masks: StepMasks, other: StepMasks | None) -> list[Tensor]:
    """Of each token [rows, tokens]: what the other step kept, what both did, and their Jaccard index.

    Of two masks that keep nothing the index is 1: they are the same.
    """
    if other is None:
        return [torch.zeros_like(masks.count)] * 3
    other = other.first(masks.count.shape[1])
    if masks.experts is None or other.experts is None:
        both = ones(masks.bits & other.bits).sum(-1)
    else:
        # Only masks of the same expert have neurons in common, and a token meets an expert once.
        both = torch.zeros_like(masks.count)
        for k in range(masks.experts.shape[-1]):
            same = masks.experts == other.experts[..., k : k + 1]
            both += (ones(masks.bits & other.bits[:, :, k : k + 1]) * same).sum(-1)
    either = masks.count + other.count - both
    index = torch.where(either > 0, both * UNIT // either.clamp(min=1), UNIT)
    return [other.count, both, index]
