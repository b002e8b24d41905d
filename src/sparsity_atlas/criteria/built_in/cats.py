"""CATS: a quantile threshold on the gate."""

from __future__ import annotations

from sparsity_atlas.criteria.built_in.quantile import Quantile


class Cats(Quantile):
    """Keep the entries with |σ(W_g x)| ≥ t, with a threshold for each layer (arXiv 2404.08763).

    The level is the target sparsity, the same for all layers.
    """

    sites = ("gate",)
    calibrated = True
    allocated = True
