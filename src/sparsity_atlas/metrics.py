"""Stage `metrics`: what a site's activations look like, layer by layer, from the store alone.

Works on numpy, a block of tokens at a time; memory is bounded by one layer's Gram matrix and block.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations import ActivationStore
from sparsity_atlas.parquet import write_parquet
from sparsity_atlas.store import read_manifest

# An entry is near zero when it is at most this share of its token's largest magnitude.
NEAR_ZERO = 0.01
# Bins of log10(|v| / RMS of the layer), each a twentieth of a decade.
BIN_EDGES = np.linspace(-6.0, 2.0, 161)
_BLOCK_BYTES = 64 * 2**20


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007).

    Args:
        values: [tokens, channel]. The singular values come from the Gram matrix of the smaller side
            in float64, so those below 1e-8 of the largest are noise; they weigh nothing here.
    """
    wide = values.shape[1] > values.shape[0]
    gram = np.zeros((min(values.shape),) * 2)
    step = max(1, _BLOCK_BYTES // (8 * values.shape[0 if wide else 1]))
    for start in range(0, values.shape[1 if wide else 0], step):
        block = values[:, start : start + step] if wide else values[start : start + step].T
        block = block.astype(np.float64)
        gram += block @ block.T
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    if singular.sum() == 0:
        return 0.0
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def gini(magnitude: np.ndarray) -> np.ndarray:
    """Gini coefficient of each row (0: all equal, towards 1: one entry has all); NaN for zero rows.

    Args:
        magnitude: [rows, channel], not negative.
    """
    ordered = np.sort(magnitude, axis=1).astype(np.float64)
    width = magnitude.shape[1]
    rank = 2 * np.arange(1, width + 1) - width - 1
    total = ordered.sum(1)
    return np.divide(
        ordered @ rank, width * total, out=np.full(len(total), np.nan), where=total > 0
    )


def hoyer(magnitude: np.ndarray) -> np.ndarray:
    """Hoyer's sparsity (√n - L1/L2) / (√n - 1) of each row, 0 to 1; NaN for zero rows.

    Args:
        magnitude: [rows, channel], not negative, at least two channels.
    """
    wide = magnitude.astype(np.float64)
    l1, l2 = wide.sum(1), np.sqrt((wide**2).sum(1))
    root = np.sqrt(magnitude.shape[1])
    ratio = np.divide(l1, l2, out=np.full(len(l1), np.nan), where=l2 > 0)
    return (root - ratio) / (root - 1)


def layer_metrics(values: np.ndarray) -> dict[str, Any]:
    """Every metric of one layer.

    Args:
        values: [tokens, channel], float32.

    Returns:
        tokens, width, effective_rank, effective_rank_share (of the width), gini and hoyer (means
        over tokens), near_zero and exact_zero (shares of entries; near includes exact), rms, and
        histogram: counts of log10(|v| / rms) in BIN_EDGES (zeros and what lies outside left out).
    """
    tokens, width = values.shape
    rms = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
    sums = {"gini": 0.0, "hoyer": 0.0}
    counted = near = exact = 0
    histogram = np.zeros(len(BIN_EDGES) - 1, dtype=np.int64)
    step = max(1, _BLOCK_BYTES // (8 * width))
    for start in range(0, tokens, step):
        magnitude = np.abs(values[start : start + step])
        alive = magnitude.max(1) > 0
        counted += int(alive.sum())
        sums["gini"] += float(np.nansum(gini(magnitude)))
        sums["hoyer"] += float(np.nansum(hoyer(magnitude)))
        near += int((magnitude <= NEAR_ZERO * magnitude.max(1, keepdims=True)).sum())
        exact += int((magnitude == 0).sum())
        positive = magnitude[magnitude > 0]
        histogram += np.histogram(np.log10(positive / rms), BIN_EDGES)[0]
    rank = effective_rank(values)
    means = {name: total / counted if counted else None for name, total in sums.items()}
    return {
        "tokens": tokens,
        "width": width,
        "effective_rank": rank,
        "effective_rank_share": rank / width,
        **means,
        "near_zero": near / values.size,
        "exact_zero": exact / values.size,
        "rms": rms,
        "histogram": histogram.tolist(),
    }


SCHEMA = pa.schema(
    [
        ("tensor", pa.string()),
        ("layer", pa.int64()),
        ("tokens", pa.int64()),
        ("width", pa.int64()),
        *(
            (name, pa.float64())
            for name in ("effective_rank", "effective_rank_share", "gini", "hoyer")
        ),
        *((name, pa.float64()) for name in ("near_zero", "exact_zero", "rms")),
        ("histogram", pa.list_(pa.int64())),
    ]
)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_atlas.metrics", description=__doc__)
    parser.add_argument("--capture", required=True, type=Path, help="manifest of the captured site")
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()

    site = read_manifest(arguments.capture)["site"]
    tensors = ["input", "intermediate"] if site == "all_inputs" else [site]
    store = ActivationStore(arguments.store)
    for tensor in tensors:
        store.check(tensor)
    rows = [
        {"tensor": tensor, "layer": layer, **layer_metrics(store.read(tensor, layer))}
        for tensor in tensors
        for layer in range(store.layers(tensor))
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_parquet(arguments.output, table)


if __name__ == "__main__":
    cli.run(main)
