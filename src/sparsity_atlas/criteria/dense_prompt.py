"""A part of the prompt that stays dense, whatever the rule: keys beside any rule of single rows.

dense_prompt   a share of it, as TEAL, WINA and R-Sparse leave half of it: of a prompt of n tokens the first
               ⌊share · n⌋
dense_tokens   the first so many of them

In generation the prompt is what was given, and every new token is sparsified. Where a text is only scored,
it is the whole sequence of one forward pass, context and continuation together.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from sparsity_atlas.errors import AtlasError

KEYS = ("dense_prompt", "dense_tokens")


class DensePrompt(NamedTuple):
    """How much of a prompt stays dense: a share of its tokens, or so many."""

    share: Fraction = Fraction(0)
    tokens: int = 0


def read(name: str, spec: Mapping[str, Any]) -> DensePrompt | None:
    """What a criterion's configuration says of it; None: nothing.

    Args:
        name: how messages call the criterion.
        spec: its configuration.

    Raises:
        AtlasError: both keys, or a value that one cannot have.
    """
    share, tokens = (spec.get(key) for key in KEYS)
    if share is None and tokens is None:
        return None
    if share is not None and tokens is not None:
        raise AtlasError(f"{name}: give either dense_prompt or dense_tokens, not both")
    if tokens is not None:
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise AtlasError(
                f"{name}: dense_tokens: expected a whole number of at least 1, found {tokens!r}"
            )
        return DensePrompt(tokens=tokens)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
        raise AtlasError(
            f"{name}: dense_prompt: expected a number between 0 and 1, found {share!r}"
        )
    # The decimal that the user wrote, so that 0.29 of 100 tokens are 29.
    return DensePrompt(share=Fraction(Decimal(repr(share))))
