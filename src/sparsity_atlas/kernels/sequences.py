"""Sums over the entries and over the tokens of sequences, for masks that follow from a whole prompt.

Their definitions in plain torch, and the way to the kernels that give the same numbers, bit for bit: a sum
that differs in its last place moves neurons across a threshold now and then. Squares of what float32
holds are exact in float64, so that only the order of additions, and each product that is rounded, had to
be laid down. It is the same whatever the device, the threads, the padding and the rest of a batch.

Values are [batch, tokens, width]; float32, bfloat16 or float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F

from sparsity_atlas import kernels
from sparsity_atlas.kernels.definition import Threshold

if TYPE_CHECKING:
    from torch import Tensor

# As many sums of a token's squares go side by side; a power of two.
LANES = 1024


class Sums(Protocol):
    """What `cpu_sequences` and `cuda_sequences` have."""

    def energies(self, values: Tensor, counted: Tensor) -> Tensor:
        """As below."""

    def over_tokens(self, values: Tensor, weights: Tensor) -> Tensor:
        """As below."""


def energies(values: Tensor, counted: Tensor) -> Tensor:
    """The sum of the squares of each counted token's entries.

    Entry j is added to the sum of lane j mod LANES, which begins with zero, in the order of the entries. Then
    neighbours are added, the first to the second, the third to the fourth, ..., until one sum is left: a row
    is summed up by as many threads as a device likes, and no sum is long.

    Args:
        values: [batch, tokens, width].
        counted: bool [batch, tokens]; what is not counted is not looked at.

    Returns:
        float64 [batch, tokens]; 0 where a token is not counted.
    """
    module = _module(values)
    if module is not None:
        return module.energies(values, counted)
    # A token at a time: what is made of all at once lies in memory that the system clears first.
    rows = zip(values.flatten(0, 1).split(_PIECE), counted.flatten().split(_PIECE), strict=True)
    return torch.cat([_energies(*some) for some in rows]).view(counted.shape)


_PIECE = 16


def _energies(rows: Tensor, counted: Tensor) -> Tensor:
    """`energies` of [rows, width]."""
    pieces = F.pad(rows, (0, -rows.shape[-1] % LANES)).unflatten(-1, (-1, LANES)).unbind(1)
    lanes = torch.zeros(len(rows), LANES, dtype=torch.float64, device=rows.device)
    for piece in pieces:
        lanes += piece.double().square_()
    while lanes.shape[-1] > 1:
        lanes = lanes[:, ::2] + lanes[:, 1::2]
    return torch.where(counted, lanes[:, 0], 0)


def over_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · v² over the tokens of each sequence, of each neuron.

    The products, each rounded once, are added to zero in the order of the tokens: neurons are so many that
    a device has one for each of its threads, and tokens of weight 0, padding among them, change nothing.

    Args:
        values: [batch, tokens, width].
        weights: float64 [batch, tokens], not negative; tokens of weight 0 are not looked at.

    Returns:
        float64 [batch, width].
    """
    module = _module(values)
    if module is not None:
        return module.over_tokens(values, weights)
    sums = torch.zeros_like(values[:, 0], dtype=torch.float64)
    for one, weight in zip(values.unbind(1), weights[..., None].unbind(1), strict=True):
        # Not in one instruction, which would round once in place of twice.
        product = one.double().square_().mul_(weight)
        sums += product.masked_fill_(weight == 0, 0)
    return sums


def kept_by_ranks(values: Tensor, ranks: Tensor) -> Tensor:
    """Which entries of each token are among its largest |v|, as many as its sequence says, and their ties.

    Args:
        values: [batch, tokens, width].
        ranks: int64 [batch], the amounts of `Threshold`s of kind `rank`.

    Returns:
        bool [batch, tokens, width]; a token that is not all finite is kept whole.
    """
    compiled = _module(values) is not None and values.shape[-1] <= kernels.LARGEST_WIDTH
    if values.device.type == "cuda" and compiled:
        from sparsity_atlas.kernels import cuda_sequences

        # To read the ranks would be to wait for the device.
        return cuda_sequences.kept_by_ranks(values, ranks)
    rules = [Threshold("rank", rank) for rank in ranks.tolist()]
    kept = [kernels.kept_of(rule, one) for rule, one in zip(rules, values, strict=True)]
    return torch.stack(kept)


def _module(values: Tensor) -> Sums | None:
    if kernels.masks_of(values) is None:
        return None
    if values.device.type == "cuda":
        from sparsity_atlas.kernels import cuda_sequences

        return cuda_sequences
    from sparsity_atlas.kernels import cpu_sequences

    return cpu_sequences
