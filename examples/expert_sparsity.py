#!/usr/bin/env python3
"""Induced sparsity of each expert of a mixture and of dense layers, with intervals, as captured.

    python examples/expert_sparsity.py results/zoo-medium-moe/activations.zarr experts.csv

Of each row of `u * g` as it was captured (nothing upstream is sparsified) top-p at a level keeps the fewest
entries; zeros are counted by layer, expert and captured sequence. Intervals are 95 %, by a bootstrap over
sequences: an expert has other tokens in each replicate. `range` is the most less the least sparse expert of a
layer, `range_low` and `range_high` its interval: experts that are alike still have one above zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sparsity_atlas.activations.expert_rows import blocks
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.criteria import create
from sparsity_atlas.sparsify.attach import dropping

TENSOR, ROUTED = "intermediate", "experts.intermediate"


def zeros_of(values: np.ndarray, level: float) -> np.ndarray:
    """Zeros in each row that top-p leaves: int [rows]."""
    rows = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return dropping(create({"rule": "topp"}), level)(rows, rows).zeros.numpy()


def counted(store: ActivationStore, level: float) -> dict[tuple[int, int | None], np.ndarray]:
    """By layer and expert (None: a dense layer), zeros and entries of each sequence: [2, sequences]."""
    sequences, length = store.ids().shape
    found: dict[tuple[int, int | None], np.ndarray] = {}

    def add(
        layer: int, expert: int | None, where: np.ndarray, zeros: np.ndarray, width: int
    ) -> None:
        sums = found.setdefault((layer, expert), np.zeros((2, sequences)))
        np.add.at(sums[0], where, zeros)
        np.add.at(sums[1], where, width)

    if TENSOR in store.root:
        for layer in store.layers(TENSOR):
            values = store.read(TENSOR, layer)
            where = np.arange(len(values)) // length
            add(layer, None, where, zeros_of(values, level), values.shape[1])
    if ROUTED in store.root:
        for layer in store.layers(ROUTED):
            each, first = store.rows(ROUTED, layer).each, 0
            for values, experts in blocks(store, TENSOR, layer):
                where = (first + np.arange(len(values))) // each // length
                zeros, first = zeros_of(values, level), first + len(values)
                for expert in np.unique(experts):
                    own = experts == expert
                    add(layer, int(expert), where[own], zeros[own], values.shape[1])
    return found


def table(counts: dict[tuple[int, int | None], np.ndarray], replicates: int) -> pd.DataFrame:
    """A row for each expert and dense layer."""
    sequences = next(iter(counts.values())).shape[1]
    drawn = np.random.default_rng(0).multinomial(
        sequences, np.full(sequences, 1 / sequences), size=replicates
    )
    drawn = np.concatenate([np.ones((1, sequences), drawn.dtype), drawn])  # first, all of them once
    shares = {}
    for place, (zeros, entries) in counts.items():
        with np.errstate(invalid="ignore"):  # a replicate without a token of the expert
            shares[place] = drawn @ zeros / (drawn @ entries)
    rows = []
    for (layer, expert), share in shares.items():
        own = np.array([one for (where, _), one in shares.items() if where == layer])
        spread = own.max(0) - own.min(0)
        low, high = np.nanpercentile(share[1:], (2.5, 97.5))
        range_low, range_high = np.nanpercentile(spread[1:], (2.5, 97.5))
        rows.append(
            {
                **{
                    "layer": layer,
                    "expert": expert,
                    "entries": int(counts[layer, expert][1].sum()),
                },
                **{"sparsity": share[0], "low": low, "high": high, "range": spread[0]},
                **{"range_low": range_low, "range_high": range_high},
            }
        )
    return pd.DataFrame(rows).astype({"expert": "Int64"}).sort_values(["layer", "expert"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("output", type=Path, help="CSV file to write")
    parser.add_argument("--level", type=float, default=0.9, help="the share of top-p")
    parser.add_argument("--replicates", type=int, default=10_000)
    arguments = parser.parse_args()
    counts = counted(ActivationStore(arguments.store), arguments.level)
    table(counts, arguments.replicates).to_csv(arguments.output, index=False, float_format="%.6g")
