"""Leave a part of each prompt as it is, whatever a criterion would drop there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.kernels.prompts.sequence_sums import left_whole

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.dense_prompt import DensePrompt
    from sparsity_atlas.kernels import Masked
    from sparsity_atlas.sites.part import Spread
    from sparsity_atlas.sparsify.each_expert import Drop
    from sparsity_atlas.terms import Phase


def left_dense(dense: DensePrompt, valid: Tensor) -> Tensor:
    """The tokens of whole sequences that stay dense: bool [batch, tokens].

    Args:
        dense: how many.
        valid: bool [batch, tokens], True where a token is no padding, on whichever side that is.
    """
    numbers = valid.cumsum(1)  # from 1
    if dense.tokens:
        return valid & (numbers <= dense.tokens)
    lengths = valid.sum(1, keepdim=True)
    count = lengths * dense.share.numerator // dense.share.denominator
    return valid & (numbers <= count)


def sparing(
    drop: Drop, dense: DensePrompt, sequences: Callable[[Tensor], tuple[Tensor, Phase]]
) -> Drop:
    """A drop that leaves a part of each prompt dense.

    There what is zero by itself is counted, and nothing else.

    Args:
        drop: of values [batch, tokens, width], row by row.
        dense: how much stays.
        sequences: which tokens are valid, and their phase; see `attach.dropping`.

    Raises:
        AtlasError: (when called) in a phase of denoising, where prompt and answer are one sequence.
    """

    def spared(values: Tensor, onto: Tensor, spread: Spread | None = None, /) -> Masked:
        found = drop(values, onto, spread)
        valid, phase = sequences(values)
        if phase == "generation":
            return found
        if phase == "denoising":
            raise AtlasError(
                "dense_prompt: a masked-diffusion model has no prompt that is run before its answer"
            )
        stay = left_dense(dense, valid.to(values.device))
        return left_whole(found, stay, values, onto)

    return spared
