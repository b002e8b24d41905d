"""The same model with another nonlinearity, or without a gate."""

from __future__ import annotations

from dataclasses import replace

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo.recipe import Architecture, Mixture

DRELU = "drelu"
ACTIVATIONS = ("silu", "gelu", "relu", "relu2", DRELU)
# Those that are exactly zero over half a line.
RECTIFIED = ("relu", "relu2", DRELU)


def variant(
    name: str, shape: Architecture, activation: str | None, ungated: bool
) -> tuple[str, Architecture]:
    """A model with another FFN of as many weights, and what it is called.

    An ungated FFN is half as wide again: two matrices in the place of three.

    Args:
        name: the model's.
        shape: the model's.
        activation: of `ACTIVATIONS`; None: its own.
        ungated: W_d σ(W_u x) instead of W_d(W_u x ⊙ σ(W_g x)).

    Raises:
        AtlasError: there is no such model.
    """
    chosen = shape.activation if activation is None else activation
    if isinstance(shape, Mixture) and (ungated or chosen == DRELU):
        raise AtlasError(f"--model: {name}: its experts are gated, by one nonlinearity")
    if ungated and chosen == DRELU:
        raise AtlasError("--ungated: drelu is a ReLU on both factors, of which there is one then")
    if chosen != shape.activation:
        name = f"{name}-{chosen}"
    if ungated:
        name, shape = (
            f"{name}-ungated",
            replace(shape, gated=False, ffn_width=shape.ffn_width * 3 // 2),
        )
    return name, replace(shape, activation=chosen)
