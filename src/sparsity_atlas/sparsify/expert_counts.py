"""Tokens and zeros of each expert, added up on the device while a batch runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from sparsity_atlas.sites.find import Vectors
    from sparsity_atlas.sparsify.counted_vectors import Slot
    from sparsity_atlas.terms import PlaceKey


class ByExpert:
    """Sums by expert over a batch's passes, of the slots whose tokens are spread over experts.

    A token counts as often as the caller says, for each account that the caller keeps: requests that share
    a token would each have run it. Of the later passes, with their one token a row, there is one account.

    Attributes:
        slots: that are counted; without any, nothing is.
        experts: of the slot that has most, E.
        rows: of the sums: zeros of each slot, then tokens of each part that has some of the slots.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = [slot for slot in slots if slot.routing is not None]
        self.experts = max((one.routing.experts for one in self.slots if one.routing), default=0)
        self._zeros: dict[PlaceKey, int] = {slot.key: i for i, slot in enumerate(self.slots)}
        parts = dict.fromkeys((slot.key.layer, slot.key.part) for slot in self.slots)
        self._parts = {part: len(self.slots) + i for i, part in enumerate(parts)}
        # All tensors of a part have the same tokens: those of its first one are counted.
        first = {(slot.key.layer, slot.key.part): slot.key for slot in reversed(self.slots)}
        self._tokens = {key: self._parts[part] for part, key in first.items()}
        self.rows = len(self.slots) + len(parts)
        self._times: Tensor | None = None
        self._sums: list[
            Tensor
        ] = []  # of the first pass, and of the later ones: [rows, accounts, E]

    def tokens_row(self, slot: Slot) -> int:
        """Which row of the sums holds the tokens of a slot."""
        return self._parts[slot.key.layer, slot.key.part]

    def begin(self, times: Tensor) -> None:
        """Begin a batch.

        Args:
            times: how often each token of its first pass counts, int64 [accounts, batch, tokens].
        """
        self._times = times
        self._sums = [self._none(len(times), times.device), self._none(1, times.device)]

    def follow(self, times: Tensor | None) -> None:
        """Go on to a later pass, of one token a row.

        Args:
            times: how often each counts, int64 [batch]; None: once.
        """
        self._times = times

    def _none(self, accounts: int, device: torch.device) -> Tensor:
        # Apple's MPS adds up no 64-bit integers.
        place = torch.device("cpu") if device.type == "mps" else device
        return torch.zeros(self.rows, accounts, self.experts, dtype=torch.int64, device=place)

    def add(self, vectors: Vectors, zeros: Tensor, *, later: bool) -> None:
        """Count a slot's zeros.

        Args:
            vectors: what they were counted in.
            zeros: integer, one for each of the vectors.
            later: whether the pass is not the batch's first.
        """
        routed = vectors.of_pairs(zeros)
        if routed is None:
            return
        sums = self._sums[later]
        accounts = sums.shape[1]
        experts, pairs = (one.to(sums.device) for one in routed)  # [N, K]
        times = self._times
        if times is None:
            times = pairs.new_ones(len(pairs), dtype=torch.int64)
        each = times.to(sums.device).reshape(accounts, -1, 1)  # [accounts, N, 1]
        # In one line, since that is what index_add_ is fast on: an account's experts behind another's.
        offsets = torch.arange(0, accounts * self.experts, self.experts, device=sums.device)
        where = (experts + offsets[:, None, None]).reshape(-1)
        sums[self._zeros[vectors.key]].view(-1).index_add_(0, where, (pairs * each).reshape(-1))
        row = self._tokens.get(vectors.key)
        if row is not None:
            ones = each.expand(-1, *experts.shape).reshape(-1)
            sums[row].view(-1).index_add_(0, where, ones)

    def take(self) -> list[Tensor]:
        """The sums of the batch, on the device.

        Returns:
            int64 [rows, accounts + 1, E], the later passes' account last; nothing if nothing is counted.
        """
        return [torch.cat(self._sums, 1)] if self.slots else []
