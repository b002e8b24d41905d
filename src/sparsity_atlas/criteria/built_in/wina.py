"""WINA: top-k of a linear map's inputs, weighted by the columns that they meet."""

from __future__ import annotations

from typing import ClassVar

from sparsity_atlas.criteria.base import ColumnWeighted
from sparsity_atlas.criteria.built_in.topk import TopK


class Wina(ColumnWeighted, TopK):
    """Keep the k = ⌊level · width⌋ largest |x_j| · ‖W[:, j]‖₂ of each row, and their ties.

    WINA (arXiv 2505.19427) without its rotation of the weights: W is what reads x, one matrix above
    the other where several maps do. The level is the kept share, the same in every layer.
    """

    sites: ClassVar[tuple[str, ...]] = (
        "input",
        "intermediate",
        "all_inputs",
        "qkv_input",
        "o_input",
        "all_linear_inputs",
    )
