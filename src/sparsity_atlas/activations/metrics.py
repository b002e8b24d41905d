"""Stage `metrics`: what a site's activations look like, layer by layer, from the store alone.

Reads a block of tokens at a time, and the next one while it computes. At any width and number of tokens the
memory in use is that of the Gram matrix, 8 · min(tokens, width)² bytes (0.13 GB for 4,096 tokens), again
as much for its eigenvalues, and a few times BLOCK_BYTES.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparsity_atlas.activations import expert_rows
from sparsity_atlas.activations.dimension import dimension, sample
from sparsity_atlas.activations.layout import group_name, part_of
from sparsity_atlas.activations.quantiles import MagnitudeQuantiles
from sparsity_atlas.activations.store import ActivationStore, Rows, read_ahead
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.progress import told
from sparsity_atlas.terms import EXPERTS, NAMED_PARTS, PARTS, TENSORS

# An entry is near zero when it is at most this share of its token's largest magnitude.
NEAR_ZERO = 0.01
# Bins of log10(|v| / RMS of the layer), each a twentieth of a decade.
BIN_EDGES = np.linspace(-6.0, 2.0, 161)
# Rows below which an expert has no metrics but their number: no more than so many directions can be seen in
# as many rows, and an average over fewer wanders by more than a few percent.
LEAST_ROWS = 128
# Quantiles of the magnitudes, as shares of the RMS.
QUANTILES = {"quantile_10": 0.1, "quantile_50": 0.5, "quantile_90": 0.9, "quantile_99": 0.99}
BLOCK_BYTES = 64 * 2**20  # of a block in float64, or one chunk of the store if that is more


def blocks(values: np.ndarray | Rows, first: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of `values` from `first` on, and where: in blocks of whole chunks and about BLOCK_BYTES."""
    tokens, width = values.shape
    chunk = getattr(values, "chunk", 1)
    step = max(1, BLOCK_BYTES // (8 * width * chunk)) * chunk
    places = [slice(start, min(start + step, tokens)) for start in range(first, tokens, step)]
    return read_ahead(values.__getitem__, places)


def gram(values: np.ndarray | Rows) -> np.ndarray:
    """Inner products of the smaller side: of the channels in one pass, of the tokens by pairs of blocks.

    Returns:
        float64 [channel, channel], or [token, token] where the rows are wider than they are many.
    """
    tokens, width = values.shape
    if width <= tokens:
        total = np.zeros((width, width))
        for _, part in blocks(values):
            block = part.astype(np.float64)
            total += block.T @ block
        return total
    total = np.empty((tokens, tokens))
    for rows, part in blocks(values):
        block = part.astype(np.float64)
        total[rows, rows] = block @ block.T
        for others, other in blocks(values, rows.stop):
            product = block @ other.astype(np.float64).T
            total[rows, others], total[others, rows] = product, product.T
    return total


def effective_rank(values: np.ndarray | Rows) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007).

    Args:
        values: [tokens, channel]. The singular values come from the Gram matrix of the smaller side
            in float64, so those below 1e-8 of the largest are noise; they weigh nothing here.
    """
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram(values)), 0, None))
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
    found = np.full(len(total), np.nan)
    np.divide(ordered @ rank, width * total, out=found, where=total > 0)
    return found


def hoyer(magnitude: np.ndarray) -> np.ndarray:
    """Hoyer's sparsity (√n - L1/L2) / (√n - 1) of each row, 0 to 1; NaN for zero rows.

    Args:
        magnitude: [rows, channel], not negative, at least two channels.
    """
    wide = magnitude.astype(np.float64)
    l1, l2 = wide.sum(1), np.sqrt((wide**2).sum(1))
    root = np.sqrt(magnitude.shape[1])
    ratio = np.full(len(l1), np.nan)
    np.divide(l1, l2, out=ratio, where=l2 > 0)
    sparsity: np.ndarray = (root - ratio) / (root - 1)
    return sparsity


class Moments:
    """Sums of the first four powers of values that are seen a block at a time.

    They are taken around the mean of the first block, so that nothing cancels where the values lie far from
    zero.
    """

    def __init__(self) -> None:
        self._centre: float | None = None
        self._sums = np.zeros(4)
        self._count = 0

    def add(self, block: np.ndarray) -> None:
        """Count a block."""
        wide = block.astype(np.float64)
        if self._centre is None:
            self._centre = float(wide.mean())
        wide -= self._centre
        squares = wide * wide
        self._sums += [wide.sum(), squares.sum(), (squares * wide).sum(), (squares**2).sum()]
        self._count += block.size

    def kurtosis(self) -> float | None:
        """Fourth central moment over the squared variance (3 if normal); None without variance."""
        mean, second, third, fourth = self._sums / self._count
        variance = second - mean**2
        if not variance > 0:
            return None
        return float((fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2)


def layer_metrics(values: np.ndarray | Rows, points: int = 0) -> dict[str, Any]:
    """Every metric of one layer.

    Args:
        values: [tokens, channel], float32, in memory or in the store.
        points: tokens among which the local dimension is estimated, evenly spread; 0: it is not.

    Returns:
        tokens, width, effective_rank, effective_rank_share (of the width), gini and hoyer (means
        over tokens), near_zero, exact_zero and at_most_zero (shares of entries; near includes exact), rms,
        kurtosis (of all entries together; 3 if they were normal), the quantiles of QUANTILES as shares of
        the rms, histogram: counts of log10(|v| / rms) in BIN_EDGES (without zeros and what is outside), and
        lid and lid_geomle (see `dimension`) where they are asked for.
    """
    tokens, width = values.shape
    entries = tokens * width
    sums = {"gini": 0.0, "hoyer": 0.0}
    counted = near = exact = low = 0
    squares = 0.0
    moments, quantiles = Moments(), MagnitudeQuantiles(tuple(QUANTILES.values()))
    for _, block in blocks(values):
        magnitude = np.abs(block)
        counted += int((magnitude.max(1) > 0).sum())
        squares += float(np.sum(magnitude.astype(np.float64) ** 2))
        sums["gini"] += float(np.nansum(gini(magnitude)))
        sums["hoyer"] += float(np.nansum(hoyer(magnitude)))
        near += int((magnitude <= NEAR_ZERO * magnitude.max(1, keepdims=True)).sum())
        exact += int((magnitude == 0).sum())
        low += int((block <= 0).sum())
        moments.add(block)
        quantiles.first(magnitude)
    rms = (squares / entries) ** 0.5
    histogram = np.zeros(len(BIN_EDGES) - 1, dtype=np.int64)
    for _, block in blocks(values):
        magnitude = np.abs(block)
        histogram += np.histogram(np.log10(magnitude[magnitude > 0] / rms), BIN_EDGES)[0]
        quantiles.second(magnitude)
    rank = effective_rank(values)
    means = {name: total / counted if counted else None for name, total in sums.items()}
    return {
        "tokens": tokens,
        "width": width,
        "effective_rank": rank,
        "effective_rank_share": rank / width,
        **means,
        "near_zero": near / entries,
        "exact_zero": exact / entries,
        "at_most_zero": low / entries,
        "rms": rms,
        "kurtosis": moments.kurtosis(),
        **{
            name: value / rms if rms else None
            for name, value in zip(QUANTILES, quantiles.found(), strict=True)
        },
        **_local(values, points),
        "histogram": histogram.tolist(),
    }


def _local(values: np.ndarray | Rows, points: int) -> dict[str, float | None]:
    if not points:
        return {}
    found = dimension(sample(values, points))
    return {"lid": found.mle, "lid_geomle": found.geomle}


def part_metrics(
    store: ActivationStore, part: str, tensor: str, layer: int, points: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of a part's tensor in one layer: one; of routed experts one an expert, with its number.

    Every expert writes into a space of its own, so that all their rows together have no rank that means
    anything. Of an expert with fewer than LEAST_ROWS there is only how many.
    """
    if part != EXPERTS:
        yield layer_metrics(store.rows(group_name(part, tensor), layer), points)
        return
    width = store.shape(group_name(part, tensor), layer)[1]
    counts = expert_rows.loads(store, layer)
    enough = [expert for expert, count in enumerate(counts) if count >= LEAST_ROWS]
    found = {
        expert: layer_metrics(rows, points)
        for expert, rows in expert_rows.of_experts(store, tensor, layer, enough)
    }
    for expert, count in enumerate(counts):
        yield {"expert": expert, "tokens": count, "width": width, **found.get(expert, {})}


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
        *((name, pa.float64()) for name in ("near_zero", "exact_zero", "at_most_zero", "rms")),
        *((name, pa.float64()) for name in ("kurtosis", *QUANTILES, "lid", "lid_geomle")),
        ("histogram", pa.list_(pa.int64())),
    ]
)
# Of a mixture further which part, and of routed experts which one.
SCHEMA_OF_PARTS = pa.schema([*SCHEMA, ("part", pa.string()), ("expert", pa.int64())])
SCHEMAS = (SCHEMA, SCHEMA_OF_PARTS)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas metrics", description=__doc__)
    parser.add_argument("--capture", required=True, type=Path, help="manifest of the captured site")
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    parser.add_argument("--points", type=int, default=0, help="tokens for the local dimension")
    arguments = parser.parse_args()

    manifest = read_manifest(arguments.capture)
    store = ActivationStore(arguments.store)
    for name in manifest["tensors"]:
        store.check(name)
    named = {part_of(name): name for name in manifest["tensors"]}
    stored = [
        (tensor, part, layer)
        for tensor in TENSORS[manifest["site"]]
        for part in PARTS
        if (part, tensor) in named
        for layer in store.layers(named[part, tensor])
    ]
    rows = [
        {"tensor": tensor, "layer": layer, "part": part, **row}
        for tensor, part, layer in told(stored, "measured", "layers")
        for row in part_metrics(store, part, tensor, layer, arguments.points)
    ]
    schema = SCHEMA_OF_PARTS if any(part in NAMED_PARTS for part, _ in named) else SCHEMA
    write_parquet(arguments.output, pa.Table.from_pylist(rows, schema))
