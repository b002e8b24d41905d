"""In which order sums over sequences go, on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# As many sums of a token's squares go side by side; a power of two.
LANES = 1024
# Tokens that one sum goes over before sums are added.
RUN = 256


def first_of(weights: Tensor) -> Tensor:
    """Of each sequence the first token whose weight is not zero, else 0: int64 [batch]."""
    return (weights > 0).to(torch.uint8).argmax(-1)
