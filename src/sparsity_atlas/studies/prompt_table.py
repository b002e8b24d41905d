"""The table of what `prompt_reuse` measures: light, since tables and figures read it."""

from __future__ import annotations

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("continuation", pa.string()),  # whose tokens follow the prompt: given, or generated
        ("quantity", pa.string()),
        # Null where all places are masked at once.
        *((name, pa.string()) for name in ("part", "tensor")),
        ("layer", pa.int64()),
        # Tokens behind the prompt's last one, the nearest is 1.
        ("nearest", pa.int64()),
        ("farthest", pa.int64()),
        ("value", pa.float64()),  # null: NaN or an infinity came up
        ("low", pa.float64()),  # 95 % interval by bootstrap over the sequences
        ("high", pa.float64()),
        ("chance", pa.float64()),  # of an overlap: that of a mask drawn at random
    ]
)
CONTINUATIONS = ("given", "generated")
# Of the neurons that a later token would choose, the share that are in the mask of its own prompt, or of
# another sequence's; and what that mask leaves out.
OVERLAP, OVERLAP_ANOTHER, SPARSITY = "overlap", "overlap_another", "sparsity"
# Nats a token: of the dense model, and what is added where later tokens take the prompt's mask, their own of
# that size, or the mask of another prompt; and the first of these less the second.
LOSS = "loss"
ADDED = {"prompt": "added_by_reuse", "own": "added_by_own", "another": "added_by_another"}
COST = "cost_of_reuse"
QUANTITIES = (OVERLAP, OVERLAP_ANOTHER, SPARSITY, LOSS, *ADDED.values(), COST)
