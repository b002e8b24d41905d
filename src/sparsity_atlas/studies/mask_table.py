"""The table of what `token_masks` counts: light, since tables and the report read it."""

from __future__ import annotations

import pyarrow as pa

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("level", "part", "tensor")),
        ("layer", pa.int64()),
        ("quantity", pa.string()),
        ("at", pa.float64()),
        *((name, pa.float64()) for name in ("value", "independent", "by_frequency")),
    ]
)
QUANTITIES = ("unused", "reuse", "jaccard", "sparsity", "frequency", "always")
UNUSED, REUSE, JACCARD, POSITION, FREQUENCY, ALWAYS = QUANTITIES
# The level of masks that no criterion made: what is not exactly zero.
EXACT = "exact"
# Only where the configuration asks for them: pairs of neurons, and predictors of masks.
COACTIVATION, BEST_PARTNER = "coactivation", "best_partner"
RECALL = {"weights": "recall_by_weights", "probe": "recall_by_probe"}
PREDICTED = {"weights": "sparsity_by_weights", "probe": "sparsity_by_probe"}
# At thresholds of what a neuron adds; of no criterion, and so of no level of one.
CETT, CETT_SPARSITY = "cett", "cett_sparsity"
DENSE = "dense"
