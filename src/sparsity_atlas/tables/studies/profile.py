"""Sparsity by layer where criteria drop as much on the average: whose layers are alike, and whose are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

PROFILE = ["model", "criterion", "site", "tensor", "mean_sparsity", "layer", "sparsity"]
# Means over the layers that are read between the levels.
MEANS = tuple(round(0.1 * tenths, 1) for tenths in range(1, 10))


def profile_rows(
    key: dict[str, str], layers: Mapping[str, Mapping[str, Sequence[float | None]]]
) -> Iterator[dict[str, Any]]:
    """A curve's rows of layer_profile.csv.

    Between two levels each layer's sparsity lies on a straight line over the mean of all layers; beyond the
    mildest and the harshest level nothing is said.

    Args:
        key: model, criterion and site.
        layers: induced sparsity under the tasks, by level and tensor; None where a layer stays dense. A level
            at which every task failed has no tensors.
    """
    for tensor in dict.fromkeys(name for tensors in layers.values() for name in tensors):
        counted = [own[tensor] for own in layers.values() if tensor in own]
        shares = np.array([[np.nan if one is None else one for one in own] for own in counted])
        used = ~np.isnan(shares).any(0)
        if not used.any():
            continue
        means = shares[:, used].mean(1)
        order = np.argsort(means, kind="stable")
        for mean in MEANS:
            if not means.min() <= mean <= means.max():
                continue
            for layer in np.flatnonzero(used).tolist():
                share = np.interp(mean, means[order], shares[order, layer])
                yield {
                    **key,
                    **{"tensor": tensor, "mean_sparsity": mean, "layer": layer},
                    "sparsity": float(share),
                }
