"""What the slots counted in one forward pass, by token, on the devices that they were counted on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsity_atlas.sparsify.transfer import stacked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    Block = tuple[Tensor, Tensor]


class PassCounts:
    """Zeros, and whether vectors are finite, of each slot and token of one pass."""

    def __init__(self, slots: int) -> None:
        """Begin with nothing counted."""
        self._zeros: list[Tensor | None] = [None] * slots  # each [batch, tokens]
        self._finite: list[Tensor | None] = [None] * slots
        self._blocks: dict[torch.device, Block] = {}  # by device, each [slots, batch, tokens]
        self._within: dict[int, Block] = {}  # slots whose counts lie in a block

    def put(self, slot: int, zeros: Tensor, finite: Tensor) -> None:
        """Keep a slot's counts [batch, tokens]."""
        if zeros.device.type == "cpu":
            # In one block for all slots: kept by itself, each would lie where the pass had a large tensor,
            # which malloc then could not give again, so that memory grew by one for each slot.
            block = self.room([slot], zeros.shape, zeros.dtype, zeros.device)
            block[0][slot], block[1][slot] = zeros, finite
            return
        self._zeros[slot], self._finite[slot] = zeros, finite

    def room(
        self, slots: Iterable[int], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Block:
        """Where the counts of some slots, each [batch, tokens], are to be written.

        Args:
            slots: which will be.
            shape: [batch, tokens].
            dtype: of the zeros.
            device: on which they are counted.

        Returns:
            Zeros and whether vectors are finite, [slots, batch, tokens], of all slots.
        """
        if device not in self._blocks:
            whole = (len(self._zeros), *shape)
            self._blocks[device] = (
                torch.empty(whole, dtype=dtype, device=device),
                torch.empty(whole, dtype=torch.bool, device=device),
            )
        block = self._blocks[device]
        self._within.update(dict.fromkeys(slots, block))
        return block

    def taken(self, device: torch.device) -> Block:
        """Zeros and whether vectors are finite, [slots, batch, tokens], on one device.

        What layers on other devices counted comes there now.
        """
        block = self._blocks.get(device)
        if block is not None and len(self._within) == len(self._zeros) and len(self._blocks) == 1:
            return block
        for slot, (zeros, finite) in self._within.items():
            self._zeros[slot], self._finite[slot] = zeros[slot], finite[slot]
        return stacked(self._zeros, device), stacked(self._finite, device)
