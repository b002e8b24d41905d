"""Weights that a forward pass over one token reads."""

from __future__ import annotations

from typing import Any


def weights_of_a_token(manifest: dict[str, Any]) -> int:
    """Weights that a forward pass over one token reads: all but the rows of other tokens' embeddings.

    Of routed experts those that the token meets. The output head is read whole.

    Args:
        manifest: content of model.json.
    """
    counts = manifest["parameters"]
    layers: int = counts.get("active_non_embedding", counts["non_embedding"])
    head: int = manifest["hidden"] * manifest["memory"]["vocabulary"]
    return layers + head
