"""An example of a criterion of one's own; see CONTRIBUTING.md."""

from torch import Tensor

from sparsity_atlas.criteria.base import Criterion


class MeanShare(Criterion):
    """Keep |v| ≥ level · mean|v|. level = 0 changes nothing; an all-zero row is left alone."""

    highest = 8.0
    dense_level = 0.0
    coarse_levels = ("0.1", "0.4", "1", "2")

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        magnitude = values.abs()
        return magnitude >= level * magnitude.float().mean(-1, keepdim=True)
