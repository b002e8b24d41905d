"""The likeliest token of a step, found in parts of the vocabulary."""

from __future__ import annotations

import pytest
import torch

from sparsity_atlas.lm.continuous.recorded_step import likeliest


@pytest.mark.parametrize("size", [1, 7, 96, 509, 1021, 1536])
def test_the_first_largest(size: int) -> None:
    """Many ties, of sizes that have parts, or are prime; rows with infinities and NaN."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randint(0, 5, (40, size), generator=generator).float()
    places = torch.randint(0, size, (3, 4), generator=generator)
    for rows, at, value in zip(
        (slice(0, 4), slice(4, 8), slice(8, 12)),
        places,
        (torch.inf, torch.nan, -torch.inf),
        strict=True,
    ):
        logits[rows].scatter_(1, at[:, None], value)
    tokens, entire = likeliest(logits)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(entire, ~(logits.isnan() | (logits == torch.inf)).any(-1))
