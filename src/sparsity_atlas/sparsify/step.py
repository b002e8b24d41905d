"""Which pass of denoising a forward pass is, as whoever calls the model announces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A forward pass over whole sequences, a prompt and its answer each, in which some tokens are filled in.

    Attributes:
        number: of the step, over the whole generation, from 0.
        rows: of each sequence its number in the batch of prompts; those that are finished are not run.
        prompt: bool [sequences, tokens], tokens of prompts; the others that are valid are of answers.
        masked: bool [sequences, tokens], tokens of answers that are not filled in yet.
        guide: whether it is the step's second pass, which guidance makes with the prompt masked.
    """

    number: int
    rows: Sequence[int]
    prompt: Tensor
    masked: Tensor
    guide: bool = False
