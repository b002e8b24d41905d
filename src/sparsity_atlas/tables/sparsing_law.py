"""What Sparsing Law prints of its own models (arXiv 2411.02335), to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass

from sparsity_atlas.statistics.training_laws import LOGSPACE, POWER

SOURCE = "Sparsing Law, arXiv 2411.02335"


@dataclass(frozen=True)
class PublishedFit:
    """A law that the paper fitted to one training, at PPL-1% over CETT.

    Attributes:
        billions: parameters, outside the embeddings.
        activation: relu or silu.
        law: as ours are named.
        alpha: of the law, as c and b, with training tokens in billions.
        c: likewise.
        b: likewise; None of the law that has none.
        limit: activation ratio that the training goes to.
    """

    billions: float
    activation: str
    law: str
    alpha: float
    c: float
    b: float | None
    limit: float

    @property
    def hub(self) -> str:
        """The checkpoint on the Hub."""
        return f"SparseLLM/sparsing-law-{self.billions:g}b-{self.activation}"


PUBLISHED_FITS = (
    PublishedFit(0.1, "relu", LOGSPACE, 0.101, 3.20, -0.0151, 0.0614),
    PublishedFit(0.2, "relu", LOGSPACE, 0.449, 0.286, -3.05, 0.0674),
    PublishedFit(0.4, "relu", LOGSPACE, 0.683, 0.079, -3.46, 0.0690),
    PublishedFit(0.8, "relu", LOGSPACE, 1.01, 0.00797, -3.49, 0.0721),
    PublishedFit(1.2, "relu", LOGSPACE, 1.33, 9.03e-4, -3.89, 0.0782),
    PublishedFit(2.4, "relu", LOGSPACE, 1.53, 1.56e-4, -3.46, 0.0648),
    PublishedFit(0.1, "silu", POWER, 0.479, 0.102, None, 0.409),
    PublishedFit(0.2, "silu", POWER, 0.844, 0.208, None, 0.390),
    PublishedFit(0.4, "silu", POWER, 1.03, 0.420, None, 0.385),
    PublishedFit(0.8, "silu", POWER, 0.995, 0.562, None, 0.383),
    PublishedFit(1.2, "silu", POWER, 0.967, 0.538, None, 0.382),
)
# The sparsity of its largest model at PPL-1%, in percent.
LARGEST, LARGEST_SPARSITY = "SparseLLM/sparsing-law-2.4b-relu", 93.52
