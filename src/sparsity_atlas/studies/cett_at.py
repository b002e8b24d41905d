"""CETT at given thresholds: what an FFN's output loses if neurons that add little are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sparsity_atlas.activations.sources import given, reader
from sparsity_atlas.activations.store import ActivationStore, read_ahead
from sparsity_atlas.criteria.place import Place
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.studies.mask_table import CETT, CETT_SPARSITY, DENSE

# Of the intermediate vectors of a block of tokens.
BLOCK_BYTES = 64 * 2**20


def cett_rows(
    ffn: FFN, store: ActivationStore, thresholds: Sequence[float], first: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of `mask_table.SCHEMA` of one FFN, without what names its place.

    A neuron is dropped for a token where ‖n_j‖₂ = |i_j| · ‖W_d[:, j]‖₂ < ε; cett is the mean over tokens of
    ‖Σ n_j of the dropped‖ / ‖FFN(x)‖ (Sparsing Law, arXiv 2411.02335), cett_sparsity the share dropped. A
    token whose output is zero has no CETT.

    Args:
        ffn: the FFN.
        store: with its input.
        thresholds: ε, of the norm of what a neuron adds.
        first: token to begin with.
    """
    place = Place(ffn, "intermediate")
    norms = place.column_norms()
    tokens, width = store.ids().size, ffn.width
    step = max(1, BLOCK_BYTES // (4 * width))
    lost = dict.fromkeys(thresholds, 0.0)
    dropped = dict.fromkeys(thresholds, 0)
    counted = 0
    places = [slice(one, min(one + step, tokens)) for one in range(first, tokens, step)]
    for _, block in read_ahead(reader(store, ffn, "intermediate"), places):
        values = ffn.recompute(given(block, ffn), "intermediate").float().to(norms.device)
        whole = place.outputs(values).norm(dim=-1)
        used = whole > 0
        counted += int(used.sum())
        scores = values.abs() * norms
        for epsilon in thresholds:
            small = scores < epsilon
            dropped[epsilon] += int(small.sum())
            error = place.product(torch.where(small, values, 0)).norm(dim=-1)
            lost[epsilon] += float((error[used] / whole[used]).double().sum())
    for epsilon in thresholds:
        value = lost[epsilon] / counted if counted else None
        share = dropped[epsilon] / ((tokens - first) * width)
        yield {"level": DENSE, "quantity": CETT, "at": epsilon, "value": value}
        yield {"level": DENSE, "quantity": CETT_SPARSITY, "at": epsilon, "value": share}
