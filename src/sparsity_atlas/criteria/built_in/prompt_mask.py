"""Prompt mask: the neurons that a prompt uses most, for everything after it."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch

from sparsity_atlas.criteria.base import PromptCriterion
from sparsity_atlas.criteria.built_in.topk import TopK
from sparsity_atlas.kernels import kept_of
from sparsity_atlas.kernels.prompts import sequence_sums

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place
    from sparsity_atlas.kernels.definition import Threshold
    from sparsity_atlas.terms import Phase

After = Literal["prompt", "own"]


class PromptMask(PromptCriterion):
    """Keep, after the prompt, the k = ⌊level · width⌋ neurons with the largest ‖z̄[:, j]‖₂ over it.

    z̄ are the prompt's vectors, each divided by its length (GRIFFIN, arXiv 2404.01365). The prompt is
    dense. In generation it is what was given; where given tokens are only scored, or masks
    among them filled in, it is the first `prompt_share` of each sequence, and the others take the mask that
    it leaves. The level is the
    kept share after the prompt, so that induced sparsity, counted over all tokens, is lower.

    `after: own` is the control at equal sparsity: of each token after the prompt as many neurons are kept
    as the prompt's mask has, those with the largest |v_j|, and their ties.
    """

    sites: ClassVar[tuple[str, ...]] = ("up", "gate", "intermediate")
    not_in_experts = "it looks at whole sequences, of which an expert sees some tokens"
    dense_level = 1.0
    coarse_levels = ("0.8", "0.6", "0.4", "0.2")

    def __init__(self, prompt_share: float = 0.5, after: After = "prompt") -> None:
        number = isinstance(prompt_share, int | float) and not isinstance(prompt_share, bool)
        if not number or not 0 < prompt_share < 1:
            raise ValueError(
                f"prompt_share: expected a number between 0 and 1, found {prompt_share!r}"
            )
        if after not in get_args(After):
            raise ValueError(f"after: expected {' or '.join(get_args(After))}, found {after!r}")
        self.prompt_share = float(prompt_share)
        self.after = after
        self._kept: Tensor | None = None

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        # A copy: each layer has neurons of its own to remember.
        return copy.copy(self)

    def neurons(self, prompt: Tensor, counted: Tensor, level: float) -> Tensor:
        """Which neurons a prompt keeps: bool [batch, width].

        Args:
            prompt: [batch, tokens, width]; sums over it are float64, in the order of `kernels.prompts`.
            counted: bool [batch, tokens], True for the prompt's tokens; at least one in each row. One that
                is all zeros, or not finite, adds nothing.
            level: in [lowest, highest].
        """
        energies = sequence_sums.energies(prompt, counted)
        used = (energies > 0) & (energies < torch.inf)
        squares = sequence_sums.over_tokens(prompt, torch.where(used, 1 / energies, 0))
        return kept_of(_largest(level, prompt.shape[-1]), squares.float())

    def scores(self, values: Tensor) -> Tensor:
        """What a token's own neurons are ordered by, but for signs: of the shape of values [..., width]."""
        return values

    def own(self, values: Tensor, kept: Tensor) -> Tensor:
        """Which neurons each token would keep if it chose as many as a prompt's mask has.

        Args:
            values: [batch, tokens, width].
            kept: bool [batch, width], what `neurons` gave.

        Returns:
            bool [batch, tokens, width].
        """
        return sequence_sums.kept_by_ranks(self.scores(values), kept.sum(-1))

    def prompt_of(self, valid: Tensor) -> Tensor:
        """Which tokens are the prompt of sequences that are not generated.

        Args:
            valid: bool [batch, tokens], True where a token is no padding.
        """
        length = valid.sum(-1, keepdim=True)
        # Of 100 times 0.07 float64 makes a little more than 7.
        end = (length.double() * self.prompt_share - 1e-9).ceil()
        return valid & (valid.cumsum(-1) <= end)

    def mask_sequences(self, values: Tensor, valid: Tensor, phase: Phase, level: float) -> Tensor:
        """See `SequenceCriterion.mask_sequences`."""
        if phase == "generation":
            assert self._kept is not None, "a generation begins with its prompt"
            if self.after == "own":
                return self.own(values, self._kept)
            return self._kept[:, None].expand(values.shape)
        prompt = self.prompt_of(valid) if phase in ("scoring", "denoising") else valid
        self._kept = self.neurons(values, prompt, level)
        # Padding takes part in neither; after a prompt follows nothing in its own pass.
        dense = prompt | ~valid
        own = self.after == "own"
        later = self.own(values, self._kept) if own else self._kept[:, None]
        return sequence_sums.spread(later, dense)


@functools.cache
def _largest(level: float, width: int) -> Threshold:
    """One object for each: a device keeps what it was told of a rule, and waits for it once."""
    return TopK().threshold(level, width)
