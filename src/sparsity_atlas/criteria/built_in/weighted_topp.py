"""Weighted top-p: top-p of the neurons' outputs in place of their activations."""

from __future__ import annotations

from sparsity_atlas.criteria.base import ColumnWeighted
from sparsity_atlas.criteria.built_in.topp import TopP


class WeightedTopP(ColumnWeighted, TopP):
    """Keep the largest |v_j| · ‖W_d[:, j]‖₂ until they hold a share p of the row's sum.

    The product is the norm of what neuron j adds to the FFN's output where v is the intermediate
    (Sparsing Law, arXiv 2411.02335, measures neurons so). Otherwise as top-p, its ends included.
    """

    sites = ("up", "gate", "intermediate")
