"""TEAL: a quantile threshold on the inputs of linear maps."""

from __future__ import annotations

from sparsity_atlas.criteria.built_in.quantile import Quantile


class Teal(Quantile):
    """Keep |x| ≥ t with a threshold for each layer and input (TEAL, arXiv 2408.14690).

    The level is the target sparsity, the same for all layers. Every token is sparsified, where the
    paper spares the first half of a prompt: `dense_prompt: 0.5`.
    """

    sites = ("input", "intermediate", "all_inputs", "qkv_input", "o_input", "all_linear_inputs")
    calibrated = True
    allocated = True
