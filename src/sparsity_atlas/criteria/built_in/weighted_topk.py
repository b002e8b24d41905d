"""Weighted top-k: top-k of the neurons' outputs in place of their activations."""

from __future__ import annotations

from sparsity_atlas.criteria.built_in.wina import Wina


class WeightedTopK(Wina):
    """Keep the k = ⌊level · width⌋ largest |v_j| · ‖W_d[:, j]‖₂ of each row, and their ties.

    WINA's rule on the FFN's neurons: where v is the intermediate, the product is the norm of what
    neuron j adds to the FFN's output, which arXiv 2411.02335 thresholds. The level is the kept share,
    as of top-k.
    """

    sites = ("up", "gate", "intermediate")
