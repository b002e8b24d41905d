"""The field's names for the places in an FFN."""

from __future__ import annotations

# FFN(x) = W_d (u ⊙ g), u = W_u x, g = σ(W_g x).
SITES = ("input", "up", "gate", "intermediate", "all_inputs")

# The tensors that a site concerns, in the order in which a forward pass makes them.
TENSORS = {
    "input": ("input",),
    "up": ("up",),
    "gate": ("gate",),
    "intermediate": ("intermediate",),
    "all_inputs": ("input", "intermediate"),
}
