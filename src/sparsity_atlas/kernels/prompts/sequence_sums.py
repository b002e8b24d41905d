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
from sparsity_atlas.kernels import Masked
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.kernels.prompts.order import LANES, RUN, first_of

if TYPE_CHECKING:
    from torch import Tensor


class Sums(Protocol):
    """What `cpu_sequences` and `cuda_sequences` have."""

    def energies(self, values: Tensor, counted: Tensor) -> Tensor:
        """As below."""

    def over_tokens(self, values: Tensor, weights: Tensor) -> Tensor:
        """As below."""

    def spread(self, kept: Tensor, whole: Tensor) -> Tensor:
        """As below."""

    def leave_whole(
        self, whole: Tensor, values: Tensor, onto: Tensor, out: Tensor, zeros: Tensor
    ) -> None:
        """Write to `out` and `zeros` what `left_whole` says of tokens that stay."""


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

    From the first token whose weight is not zero on, tokens are taken in runs of RUN. Of each run the
    products, each rounded once, are added to zero in the order of the tokens; then the runs' sums to zero, in
    their order. So several threads can share a neuron of a long prompt, and padding before and behind
    it, whose weight is zero, changes nothing.

    Args:
        values: [batch, tokens, width].
        weights: float64 [batch, tokens], not negative; of a token of weight 0 nothing is looked at.

    Returns:
        float64 [batch, width].
    """
    module = _module(values)
    if module is not None:
        return module.over_tokens(values, weights)
    batch, tokens, width = values.shape
    rows, first = torch.arange(batch, device=values.device), first_of(weights)
    total = torch.zeros(batch, width, dtype=torch.float64, device=values.device)
    for start in range(0, tokens, RUN):
        run = torch.zeros_like(total)
        for step in range(start, min(start + RUN, tokens)):
            token = (first + step).clamp(max=tokens - 1)
            weight = weights[rows, token] * (first + step < tokens)
            # Not in one instruction, which would round once in place of twice.
            product = values[rows, token].double().square_().mul_(weight[:, None])
            run += product.masked_fill_(weight[:, None] == 0, 0)
        total += run
    return total


def spread(kept: Tensor, whole: Tensor) -> Tensor:
    """Masks of single tokens, of which some are kept whole.

    Args:
        kept: bool [batch, tokens, width], or [batch, 1, width] for all tokens of a sequence.
        whole: bool [batch, tokens]: of which tokens all is kept.

    Returns:
        bool [batch, tokens, width].
    """
    module = _module(kept.new_empty(1, dtype=torch.float32))
    return kept | whole[..., None] if module is None else module.spread(kept, whole)


def left_whole(found: Masked, whole: Tensor, values: Tensor, onto: Tensor) -> Masked:
    """What masking leaves where some tokens stay as they are; of these what is zero by itself is counted.

    Args:
        found: what masking left of all; what it made is written to where that is new memory.
        whole: bool [batch, tokens].
        values: [batch, tokens, width], what was looked at.
        onto: of the same shape, what was masked.
    """
    mask = None if found.mask is None else spread(found.mask, whole)
    module, out = _module(values), found.out
    own = out.data_ptr() not in (values.data_ptr(), onto.data_ptr()) and out.is_contiguous()
    if module is not None and own and values.dtype == onto.dtype == out.dtype:
        module.leave_whole(whole, values, onto, out, found.zeros)
        return found._replace(mask=mask)
    zeros = (values == 0).sum(-1).to(found.zeros.dtype)
    return found._replace(
        out=torch.where(whole[..., None], onto, out),
        zeros=torch.where(whole, zeros, found.zeros),
        mask=mask,
    )


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
        from sparsity_atlas.kernels.prompts import cuda_sequences

        # To read the ranks would be to wait for the device.
        return cuda_sequences.kept_by_ranks(values, ranks)
    rules = [Threshold("rank", rank) for rank in ranks.tolist()]
    kept = [kernels.kept_of(rule, one) for rule, one in zip(rules, values, strict=True)]
    return torch.stack(kept)


def _module(values: Tensor) -> Sums | None:
    if kernels.masks_of(values) is None:
        return None
    if values.device.type == "cuda":
        from sparsity_atlas.kernels.prompts import cuda_sequences

        return cuda_sequences
    from sparsity_atlas.kernels.prompts import cpu_sequences

    return cpu_sequences
