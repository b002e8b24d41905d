"""On a GPU: how the products of `decoding.cuda` are best cut into programs; see `decoding.py`."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import triton

from decoding import SHAPES, TYPES, fixed, layers_of, matrix, timed
from measure import machine
from sparsity_atlas.decoding import cuda_products
from sparsity_atlas.decoding.vector import Vector, prepared

SPARSITIES = (0.0, 0.5, 0.89)


def input_cuts(
    inputs: int, outputs: int, size: int, gated: bool, processors: int
) -> list[cuda_products.Cut]:
    """Cuts worth trying."""
    found = []
    for columns, warps, entries, load, listed in itertools.product(
        (512 // size, 1024 // size, 2048 // size), (4, 8), (64, 128), (2, 4, 8), (False, True)
    ):
        rows = entries * warps * 32 // columns // (2 if gated else 1)
        lanes = max(1, warps * 512 // size // columns)
        split = max(1, round(load * 4 / warps * processors / triton.cdiv(outputs, columns)))
        split = min(split, triton.cdiv(inputs, rows))
        if rows >= lanes and rows * split <= 2 * inputs:
            found.append(cuda_products.Cut(rows, columns, split, warps, listed))
    return list(dict.fromkeys(found))


OUTPUT_CUTS = [
    cuda_products.OutputCut(rows, columns, warps)
    for rows, columns, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8))
    if 1024 <= rows * columns <= 16384 and rows * columns // warps // 32 in (16, 32, 64, 128)
]


def cases(processors: int, dtype: torch.dtype) -> list[tuple[str, int, int, bool]]:
    """Name, inputs, outputs, and whether two maps are made together."""
    found = []
    for name, (hidden, width) in SHAPES.items():
        found += [(f"{name} up", hidden, width, False), (f"{name} down", width, hidden, False)]
        found += [(f"{name} factors", hidden, width, True)]
    return found


def compile_some(job: tuple[int, int, int, bool, torch.dtype, int]) -> int:
    """Compile the cuts of one case, of some workers' share."""
    place, inputs, outputs, gated, dtype, workers = job
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    weight = torch.empty(inputs, outputs, device="cuda", dtype=dtype)
    x = torch.zeros(1, inputs, device="cuda", dtype=dtype)
    vector = prepared(fixed(x + 1, 0.5), x, fused=True)
    count = 0
    second, activation = (weight, "silu") if gated else (None, None)
    for cut in input_cuts(inputs, outputs, dtype.itemsize, gated, processors)[place::workers]:
        cuda_products.by_inputs(vector, weight, second, activation=activation, cut=cut)
        count += 1
    if gated:
        other = weight.view(outputs, inputs)
        for cut in OUTPUT_CUTS[place::workers]:
            cuda_products.by_outputs(x, other, other, activation="silu", cut=cut)
            cuda_products.by_outputs(
                x, other, other, activation="silu", decides="gate", rule=vector, cut=cut
            )
            count += 2
    torch.cuda.synchronize()
    return count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--type", choices=TYPES, default="bf16")
    parser.add_argument("--best", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="do nothing else")
    arguments = parser.parse_args()
    dtype = TYPES[arguments.type]
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    jobs = [
        (place, inputs, outputs, gated, dtype, workers)
        for _, inputs, outputs, gated in cases(0, dtype)
        for place in range(workers)
    ]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        print(f"compiled {sum(pool.map(compile_some, jobs))}", flush=True)
    if arguments.compile:
        return
    print(machine("cuda"))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, inputs, outputs, gated in cases(processors, dtype):
        layers = layers_of(inputs * outputs * (1 + gated), dtype, "cuda")
        weights = [
            tuple(matrix(inputs, outputs, dtype, "cuda") for _ in range(1 + gated))
            for _ in range(layers)
        ]
        x = torch.randn(1, inputs, device="cuda").to(dtype)
        activation = "silu" if gated else None
        for sparsity in SPARSITIES:
            vector = prepared(fixed(x, sparsity), x, fused=True) if sparsity else Vector(x)
            found = []
            for cut in input_cuts(inputs, outputs, dtype.itemsize, gated, processors):
                calls = [
                    partial(cuda_products.by_inputs, vector, *three, activation=activation, cut=cut)
                    for three in weights
                ]
                found.append((timed(calls, "cuda", 5), cut))
            best = sorted(found, key=lambda one: one[0].median)[: arguments.best]
            for took, cut in best:
                print(f"{name} {sparsity:.2f} in {took} {tuple(cut)}", flush=True)
        if not gated:
            continue
        weights = [tuple(one.view(outputs, inputs) for one in three) for three in weights]
        for decides, sparsity in ((None, 0.0), ("gate", 0.5)):
            found = []
            for cut in OUTPUT_CUTS:
                rule = None
                if decides:
                    gates = torch.nn.functional.silu(torch.nn.functional.linear(x, weights[0][0]))
                    rule = prepared(fixed(gates, sparsity), gates, fused=True)
                calls = [
                    partial(
                        *(cuda_products.by_outputs, x, *three),
                        **{"activation": "silu", "decides": decides, "rule": rule, "cut": cut},
                    )
                    for three in weights
                ]
                found.append((timed(calls, "cuda", 5), cut))
            for took, cut in sorted(found, key=lambda one: one[0].median)[: arguments.best]:
                print(f"{name} {decides} {sparsity:.2f} out {took} {tuple(cut)}", flush=True)


if __name__ == "__main__":
    main()
