"""COUNTDOWN-M: a quantile threshold on the up projection."""

from __future__ import annotations

from sparsity_atlas.criteria.built_in.quantile import Quantile


class CountdownM(Quantile):
    """Keep the entries with |W_u x| ≥ t, with a threshold for each layer (arXiv 2505.17701).

    The level is the target sparsity, the same for all layers. The paper's other variant, D, looks
    at |u ⊙ g| and needs a predictor: `quantile` at `intermediate` is D with a perfect one.
    """

    sites = ("up",)
    calibrated = True
    allocated = True
