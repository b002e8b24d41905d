"""The bound of a saved masked-diffusion model's loss on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from sparsity_atlas.diffusion.denoise import denoiser
from sparsity_atlas.diffusion.likelihood import bounds
from sparsity_atlas.diffusion.rows import Request
from sparsity_atlas.zoo.batches import IGNORED
from sparsity_atlas.zoo.loss import Loss
from sparsity_atlas.zoo.tokenizer import END_OF_TEXT_ID

# Sets of masked tokens of a block. More would make the bound little surer: blocks differ more than sets do.
SAMPLES = 8

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Bound(Loss):
    """A loss that is no larger in truth: `nats` bounds the text's negative log-likelihood.

    Attributes:
        standard_error: of the nats per token, over blocks: of which text was taken, and which masks.
    """

    standard_error: float


def measure(
    model: PreTrainedModel,
    targets: np.ndarray,
    token_bytes: np.ndarray,
    mask_token: int,
    samples: int = SAMPLES,
) -> Bound:
    """The bound over blocks, each after the beginning-of-text token, in the model's own precision.

    Args:
        model: whose logits at a token are of that token.
        targets: blocks of `evaluation_blocks`, int64 [blocks, tokens].
        token_bytes: bytes of each token, [vocabulary].
        mask_token: id of the mask.
        samples: sets of masked tokens of a block, at most.
    """
    model.eval()
    blocks = [block[block != IGNORED] for block in targets]
    requests = [Request((END_OF_TEXT_ID,), tuple(block.tolist())) for block in blocks]
    found = bounds(
        denoiser(model, shifted=False),
        requests,
        samples=samples,
        batch_size=_ROWS_AT_ONCE,
        mask_token=mask_token,
        padding=END_OF_TEXT_ID,
        device=model.device,
    )
    nats, lengths = -np.array(found), np.array([len(block) for block in blocks])
    tokens = int(lengths.sum())
    return Bound(
        nats=math.fsum(nats),
        tokens=tokens,
        text_bytes=int(token_bytes[np.concatenate(blocks)].sum()),
        standard_error=_error_of_ratio(nats, lengths),
    )


def _error_of_ratio(values: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of Σ values / Σ sizes over independent pairs, by linearisation; NaN of a single one."""
    count = len(values)
    if count == 1:
        return math.nan
    rest = values - sizes * (values.sum() / sizes.sum())
    return float(math.sqrt(count / (count - 1) * (rest @ rest)) / sizes.sum())
