"""How masks change from one denoising step to the next: counted on the device while a batch runs.

Of each slot the masks of the step before and of the first step are kept as bits, for as long as a batch
runs: `mask_bytes` says how much that is. All sums are integers, so that batches add up exactly, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsity_atlas.sparsify.packed_bits import ones, packed, words
from sparsity_atlas.sparsify.step_masks import KeptMasks, StepMasks, overlap
from sparsity_atlas.sparsify.step_sums import BINS, BLOCK_SUMS, BLOCKS, REGIONS, TOKEN_SUMS
from sparsity_atlas.sparsify.transfer import sent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparsity_atlas.sites.find import Vectors
    from sparsity_atlas.sparsify.counted_vectors import Slot
    from sparsity_atlas.sparsify.step import Step

# Entries that are turned into numbers at a time.
CHUNK = 1 << 24


def mask_bytes(slots: Sequence[Slot], rows: int, tokens: int, steps: int) -> int:
    """Memory that counting by step takes at most, in bytes.

    Args:
        slots: what is counted.
        rows: of the batch.
        tokens: of its longest row, prompt and answer.
        steps: of the generation.
    """
    kept = largest = 0
    for slot in slots:
        each = slot.routing.each if slot.routing is not None and slot.of_experts else 1
        # Of a token at two steps its bits, how many they are, and its experts.
        token = 2 * 8 * (each * words(slot.width // each) + 1 + each * slot.of_experts)
        # Of a block at two steps its bits, and how often each neuron was used.
        block = 2 * 8 * words(slot.neurons) + 4 * slot.neurons
        kept += rows * (tokens * token + len(BLOCKS) * block)
        # A byte an entry while its mask is packed, in up to three copies.
        largest = max(largest, 3 * rows * tokens * slot.width)
    sums = 8 * (len(TOKEN_SUMS) * len(REGIONS) + len(BLOCK_SUMS) * len(BLOCKS))
    return kept + largest + 3 * 4 * CHUNK + steps * len(slots) * sums


class ByStep:
    """Sums by step over the denoising passes of a batch."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._index = {slot.key: place for place, slot in enumerate(slots)}
        self._step: _Step | None = None
        self._begin()

    def _begin(self) -> None:
        self._last: _Step | None = None
        self._members: list[Tensor] = []  # of each step [REGIONS + BLOCKS]: tokens, and rows
        self._sums: list[list[tuple[Tensor, Tensor] | None]] = []
        self._kept = [KeptMasks() for _ in self.slots]
        self._tokens: Tensor | None = None  # of all steps: [rows of the batch, BLOCKS]

    @property
    def counts(self) -> bool:
        """Whether the pass in hand is counted."""
        return self._step is not None

    def announce(self, step: Step | None, valid: Tensor) -> None:
        """Say what the next pass runs. The first step begins a batch.

        Args:
            step: of denoising; what is none, or runs without the prompt to guide by, is not counted.
            valid: bool [rows, tokens], what is no padding, which stands behind a row's tokens.
        """
        self._step = None
        if step is None or step.guide or not self.slots:
            return
        if step.number == 0:
            self._begin()
        before = self._last
        if before is None:
            self._tokens = torch.zeros(
                len(step.rows), len(BLOCKS), dtype=torch.int64, device=valid.device
            )
        elif before.rows != tuple(step.rows):
            # A row that is finished does not come back.
            places = torch.tensor([before.rows.index(row) for row in step.rows])
            for kept in self._kept:
                kept.shrink(places)
            before = before.shrunk(places)
        self._step = self._last = now = _Step.of(step, valid, before)
        assert self._tokens is not None
        self._tokens[now.index] += now.size
        self._members.append(torch.cat([now.regions.sum((1, 2)), (now.size > 0).sum(0)]))
        self._sums.append([None] * len(self.slots))

    def add(self, vectors: Vectors, kept: Tensor) -> None:
        """Count a slot's masks.

        Args:
            vectors: what is masked.
            kept: bool, of the shape of their values: what is left and is not zero.
        """
        if self._step is None:
            return
        place = self._index[vectors.key]
        rows, experts = vectors.of_each(kept)
        if rows.device.type == "mps":  # which adds up no 64-bit integers
            rows, experts = rows.cpu(), None if experts is None else experts.cpu()
        step = self._step.to(rows.device)
        state = self._kept[place]
        masks = StepMasks.of(rows, experts)
        numbers = [masks.count, *overlap(masks, state.before), *overlap(masks, state.first)]
        tokens = (torch.stack(numbers)[:, None] * step.regions).sum((-1, -2))
        used = _used(rows, experts, step.member, self.slots[place])
        block = packed(used > 0)
        found = [ones(block).sum(0)]
        for other in (state.block_before, state.block_first):
            found += (
                [found[0] * 0] * 2
                if other is None
                else [ones(other).sum(0), ones(block & other).sum(0)]
            )
        bins = _bins(used, step.size)
        self._sums[-1][place] = tokens, torch.cat([torch.stack(found), bins])
        assert self._tokens is not None
        state.take(masks, block, used, step.index, len(self._tokens))

    def take(self) -> list[Tensor]:
        """The sums of the batch, on the device of its first slot.

        Returns:
            int64: tokens and rows [steps, REGIONS + BLOCKS]; sums over tokens [steps, slots, TOKEN_SUMS,
            REGIONS]; over rows [steps, slots, BLOCK_SUMS, BLOCKS]; and neurons by the share of all
            steps' tokens that keep them [slots, BINS, BLOCKS]. Nothing if there was no denoising step.
        """
        if not self._members:
            return []
        assert self._tokens is not None
        sums = [_whole(one) for one in self._sums]
        device = sums[0][0][0].device
        over = [
            _bins(kept.used, self._tokens.to(kept.used.device)).to(device)
            for kept in self._kept
            if kept.used is not None
        ]
        tokens, blocks = (
            torch.stack(
                [torch.stack([one[part].to(device) for one in of_step]) for of_step in sums]
            )
            for part in (0, 1)
        )
        members = torch.stack(self._members).to(device)
        self._begin()  # which lets go of the masks
        return [members, tokens, blocks, torch.stack(over)]


def _whole(sums: list[tuple[Tensor, Tensor] | None]) -> list[tuple[Tensor, Tensor]]:
    some = [one for one in sums if one is not None]
    assert len(some) == len(sums), "a pass runs through all slots"
    return some


@dataclass(frozen=True)
class _Step:
    """A step's tokens by where they stand.

    Attributes:
        rows: their numbers in the batch.
        masked: bool [rows, tokens], what is not filled in yet.
        regions: int64 [REGIONS, rows, tokens], 1 or 0.
        member: float32 [rows, BLOCKS, tokens], 1 or 0.
        size: int64 [rows, BLOCKS], tokens.
        index: int64 [rows], their numbers in the batch.
    """

    rows: tuple[int, ...]
    masked: Tensor
    regions: Tensor
    member: Tensor
    size: Tensor
    index: Tensor

    @classmethod
    def of(cls, step: Step, valid: Tensor, before: _Step | None) -> _Step:
        prompt, answer = step.prompt & valid, valid & ~step.prompt
        masked = answer & step.masked
        # What the first step finds filled in stood there before.
        was = torch.zeros_like(masked) if before is None else before.masked[:, : valid.shape[1]]
        new = answer & ~masked & was
        member = torch.stack([prompt, answer], 1)
        return cls(
            tuple(step.rows),
            masked,
            torch.stack([prompt, masked, new, answer & ~masked & ~new]).long(),
            member.float(),
            member.sum(-1),
            sent(np.array(step.rows), valid.device),
        )

    def shrunk(self, places: Tensor) -> _Step:
        """With some of its rows, of which only what was masked is looked at any more."""
        return replace(self, masked=self.masked[places.to(self.masked.device)])

    def to(self, device: torch.device) -> _Step:
        """On a device."""
        every = (self.masked, self.regions, self.member, self.size, self.index)
        return _Step(self.rows, *(one.to(device) for one in every))


def _used(rows: Tensor, experts: Tensor | None, member: Tensor, slot: Slot) -> Tensor:
    """How many of a block's tokens keep each neuron: int32 [rows, BLOCKS, neurons].

    Args:
        rows: bool [rows, tokens, K, width].
        experts: int [rows, tokens, K].
        member: float32 [rows, BLOCKS, tokens].
        slot: whose they are.
    """
    found = []
    chunk = max(1, CHUNK // max(1, rows[0].numel()))
    for start in range(0, len(rows), chunk):
        some, own = rows[start : start + chunk].float(), member[start : start + chunk]
        if experts is None:
            # Numbers up to 2^24 are exact in float32, and so are their sums.
            found.append(own @ some.squeeze(2))
            continue
        assert slot.routing is not None
        every = slot.routing.experts
        where = experts[start : start + chunk].long()
        sums = some.new_zeros(len(some) * every, len(BLOCKS), some.shape[-1])
        offsets = torch.arange(0, len(sums), every, device=some.device)
        shares = own.transpose(1, 2)[:, :, None, :, None] * some[:, :, :, None]
        sums.index_add_(0, (where + offsets[:, None, None]).flatten(), shares.flatten(0, 2))
        found.append(sums.unflatten(0, (-1, every)).transpose(1, 2).flatten(2))
    return torch.cat(found).int()


def _bins(used: Tensor, size: Tensor) -> Tensor:
    """Neurons by the share of tokens that keep them: int64 [BINS, BLOCKS]; of rows without tokens none.

    Args:
        used: int32 [rows, BLOCKS, neurons].
        size: int64 [rows, BLOCKS], tokens.
    """
    steps = BINS - 2
    tokens = size[..., None]
    share = (used * steps + tokens - 1) // tokens.clamp(min=1)
    place = torch.where(used == tokens, BINS - 1, share)
    place = torch.where(tokens > 0, place, BINS)
    blocks = torch.arange(len(BLOCKS), device=used.device)[:, None] * (BINS + 1)
    line = torch.zeros(len(BLOCKS) * (BINS + 1), dtype=torch.int64, device=used.device)
    where = (place + blocks).flatten()
    line.index_add_(0, where, torch.ones_like(where))
    return line.view(len(BLOCKS), -1)[:, :BINS].T
