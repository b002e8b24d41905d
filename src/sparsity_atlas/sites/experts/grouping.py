"""Which rows of a mixture's tensors belong to which expert and which token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grouping:
    """The pairs of tokens N and their K experts, sorted by expert: rows S = N × K of grouped tensors.

    Attributes:
        index: int [N, K], the experts of each token, flattened batch by batch.
        experts: int [S], the expert of each grouped row, ascending.
        order: int [S], the pair n · K + k of each grouped row.
        offsets: int32 [E], where each expert's rows end.
    """

    index: Tensor
    experts: Tensor
    order: Tensor
    offsets: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token of each grouped row: int [S]."""
        return self.order // self.index.shape[-1]

    @cached_property
    def back(self) -> Tensor:
        """The grouped row of each pair: int [S]."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(self.order.numel(), device=self.order.device)
        return back

    def ungrouped(self, rows: Tensor) -> Tensor:
        """Grouped rows [S, ...] as [N, K, ...]: by token, in the order of its experts."""
        pairs: Tensor = rows[self.back].unflatten(0, self.index.shape)
        return pairs


def group(index: Tensor, experts: int) -> Grouping:
    """Sort the pairs of tokens and experts.

    Args:
        index: int [N, K], all in [0, experts).
        experts: how many there are, E.
    """
    grouped, order = torch.sort(index.reshape(-1))
    # Not bincount, which waits for the device; histc knows no integers on the CPU and Apple's MPS.
    counted = grouped.float() if index.device.type in ("cpu", "mps") else grouped.int()
    rows = torch.histc(counted, bins=experts, min=0, max=experts - 1)
    return Grouping(index, grouped, order, rows.cumsum(0, dtype=torch.int32))
