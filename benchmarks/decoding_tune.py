"""On a GPU: how the products of `decoding` are best cut into blocks; see `decoding.py`.

python benchmarks/decoding_tune.py                      # those in CUDA C++, of one token
python benchmarks/decoding_tune.py --kernels triton --output cuts.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from decoding import SHAPES, TYPES
from measure import machine
from sparsity_atlas.decoding import cluster_products, cuda_products, row_products
from sparsity_atlas.decoding.trial import fixed, layers_of, matrix, timed
from sparsity_atlas.decoding.vector import prepared

Cut, OutputCut = cuda_products.Cut, cuda_products.OutputCut
Plan, Rows = cluster_products.Plan, row_products.Rows
PROCESSORS = 132
# Of the first, the best go on to the others.
SPARSITIES = (0.5, 0.05, 0.3, 0.89)
FINALISTS = 8
# From which share of dropped entries on a plan is looked for that is best at which; the best at some go on.
BANDS = {0.0: (0.05, 0.3), 0.4: (0.5, 0.6), 0.75: (0.89,)}
TRIED, PLAN_FINALISTS = (0.5, 0.89), 14


def input_cuts(inputs: int, outputs: int, size: int, gated: bool) -> list[Cut]:
    """Cuts worth trying."""
    found = []
    maps = 2 if gated else 1
    warp = 512 // size
    for columns, warps, entries, load, listed in itertools.product(
        (warp, 2 * warp, 4 * warp, 8 * warp), (4, 8), (64, 128), (2, 4, 8), (False, True)
    ):
        rows = entries * warps * 32 // columns // maps
        lanes = max(1, warps * warp // columns)
        tiles = triton.cdiv(outputs, columns)
        split = max(1, round(load * 4 / warps * PROCESSORS / tiles))
        split = min(split, triton.cdiv(inputs, max(rows, 1)))
        if rows >= 2 * lanes and split <= 128:
            found.append(Cut(rows, columns, split, warps, listed))
    for columns, rows, load, listed in itertools.product(
        (128, 256, 512), (32, 64), (1, 2, 3), (False, True)
    ):
        split = max(1, round(load * PROCESSORS / triton.cdiv(outputs, columns)))
        split = min(split, triton.cdiv(inputs, 2 * rows))
        # Of shared memory there are 227 KB.
        if 3 * columns * rows * size * maps * load < 220e3:
            found.append(Cut(rows, columns, split, 4, listed, True, 3))
    return list(dict.fromkeys(found))


def plans(inputs: int, outputs: int, size: int, gated: bool) -> list[Plan]:
    """Ways to cut a product into clusters that are worth trying: all blocks have a place at once."""
    found = []
    for threads, per_row, split, unroll, loaded in itertools.product(
        (128, 256, 512), (16, 32, 64), (1, 2, 4, 8, 16), (3, 4, 6, 8), (512, 768, 1024, 1536)
    ):
        plan = Plan(threads, per_row, split, unroll, loaded // threads)
        blocks = math.ceil(outputs * size / (16 * per_row)) * split
        if (
            loaded % threads == 0
            and 0.35 * 512 / threads < blocks / PROCESSORS <= 0.93 * plan.blocks
            and 3000 <= loaded * unroll * (1 + gated) <= 8192
            and plan.shared(inputs, size, 1 + gated) * plan.blocks <= 200 * 1024
            and plan.chunks(inputs) <= threads // 2
        ):
            found.append(plan)
    return found


# Rows of the two factors' maps.
ROWS = [
    Rows(threads, rows, loaded // threads)
    for threads, rows, loaded in itertools.product(
        (64, 128, 256, 512), (1, 2, 4), (512, 768, 1024, 1536)
    )
    if loaded % threads == 0
]

OUTPUT_CUTS = [
    OutputCut(rows, columns, warps)
    for rows, columns, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8))
    if rows * columns // warps // 32 in (16, 32, 64, 128)
]


def cases() -> list[tuple[str, int, int, bool]]:
    """Name, inputs, outputs, and whether two maps are made together."""
    found = []
    for name, (hidden, width) in SHAPES.items():
        found += [(f"{name} up", hidden, width, False), (f"{name} down", width, hidden, False)]
        found += [(f"{name} factors", hidden, width, True)]
    return [*found, ("8B qkv", 4096, 6144, False), ("8B o", 4096, 4096, False)]


def compile_one(job: tuple[int, int, bool, torch.dtype, Cut | OutputCut]) -> str | None:
    """Compile one kernel by launching it."""
    inputs, outputs, gated, dtype, cut = job
    weight = torch.empty(inputs, outputs, device="cuda", dtype=dtype)
    x = torch.zeros(1, inputs, device="cuda", dtype=dtype)
    vector = prepared(fixed(x + 1, 0.5), x, fused=True)
    second, activation = (weight, "silu") if gated else (None, None)
    try:
        if isinstance(cut, Cut):
            cuda_products.by_inputs(vector, weight, second, activation=activation, cut=cut)
        else:
            other = weight.view(outputs, inputs)
            for decides, rule in ((None, None), ("gate", vector)):
                options = {"activation": "silu", "decides": decides, "rule": rule, "cut": cut}
                cuda_products.by_outputs(x, other, other, **options)
        torch.cuda.synchronize()
    # One that does not fit must not hide the others.
    except Exception as error:  # noqa: BLE001
        return f"{cut}: {type(error).__name__} {str(error)[:100]}"
    return None


def jobs(dtype: torch.dtype) -> list[tuple[int, int, bool, torch.dtype, Cut | OutputCut]]:
    """Each kernel once, whatever its shape."""
    found: dict[tuple[object, ...], tuple[int, int, bool, torch.dtype, Cut | OutputCut]] = {}
    for _, inputs, outputs, gated in cases():
        for cut in input_cuts(inputs, outputs, dtype.itemsize, gated):
            per = triton.cdiv(triton.cdiv(inputs, cut.split), cut.rows) * cut.rows
            reach = triton.next_power_of_2(per) if cut.listed else 1
            key = (gated, cut._replace(split=0), cut.split == 1, reach)
            found.setdefault(key, (inputs, outputs, gated, dtype, cut))
    for cut in OUTPUT_CUTS:
        found[(cut,)] = (2048, 8192, True, dtype, cut)
    return list(found.values())


def best_of(
    name: str, inputs: int, outputs: int, gated: bool, dtype: torch.dtype, arguments: Any
) -> list[int] | dict[float, list[int]]:
    """The cut that is best all in all, over the sparsities, or the plan of each of `BANDS`."""
    layers = layers_of(inputs * outputs * (1 + gated), dtype, "cuda")
    weights = [
        tuple(matrix(inputs, outputs, dtype, "cuda") for _ in range(1 + gated))
        for _ in range(layers)
    ]
    x = torch.randn(1, inputs, device="cuda").to(dtype)
    activation = "silu" if gated else None
    clusters = arguments.kernels == "clusters"
    by_inputs = cluster_products.by_inputs if clusters else cuda_products.by_inputs
    word, ways = ("plan", plans) if clusters else ("cut", input_cuts)
    took: dict[float, dict[Any, float]] = {}

    def ranked(sparsity: float, cuts: list[Any]) -> list[Any]:
        """Those that go, the fastest first."""
        vector = prepared(fixed(x, sparsity), x, fused=True)
        known = took.setdefault(sparsity, {})
        for cut in cuts:
            calls = [
                partial(by_inputs, vector, *three, activation=activation, **{word: cut})
                for three in weights
            ]
            try:
                known[cut] = timed(calls, "cuda", 7).median
            except Exception as error:  # noqa: BLE001
                print(f"{name} {cut}: {type(error).__name__}", flush=True)
        found = sorted((cut for cut in cuts if cut in known), key=lambda cut: known[cut])
        for cut in found[: arguments.show]:
            print(f"{name} {sparsity:.2f}: {known[cut]:6.1f} us {tuple(cut)}", flush=True)
        return found

    def best(cuts: list[Any], sparsities: tuple[float, ...]) -> list[int]:
        least = {one: min(took[one][cut] for cut in cuts) for one in sparsities}
        found = min(cuts, key=lambda cut: sum(math.log(took[s][cut] / least[s]) for s in least))
        times = [round(took[one][found], 1) for one in sparsities]
        print(f"{name} at {sparsities}: {tuple(found)} {times}", flush=True)
        return list(found)

    cuts: list[Any] = ways(inputs, outputs, dtype.itemsize, gated)
    if not clusters:
        for sparsity in SPARSITIES:
            cuts = ranked(sparsity, cuts)[:FINALISTS]
        return best(cuts, SPARSITIES)
    finalists = [cut for one in TRIED for cut in ranked(one, cuts)[:PLAN_FINALISTS]]
    finalists = list(dict.fromkeys(finalists))
    for one in (one for band in BANDS.values() for one in band if one not in TRIED):
        ranked(one, finalists)
    return {least: best(finalists, band) for least, band in BANDS.items()}


def best_outputs(name: str, inputs: int, outputs: int, dtype: torch.dtype, arguments: Any) -> None:
    """Print the best cuts of products by outputs."""
    layers = layers_of(inputs * outputs * 2, dtype, "cuda")
    weights: list[tuple[Tensor, Tensor]] = [
        (matrix(outputs, inputs, dtype, "cuda"), matrix(outputs, inputs, dtype, "cuda"))
        for _ in range(layers)
    ]
    x = torch.randn(1, inputs, device="cuda").to(dtype)
    gates = F.silu(F.linear(x, weights[0][0]))
    if arguments.kernels == "clusters":
        cuts: list[Any] = [one for one in ROWS if one.slices(inputs, dtype.itemsize) <= 4]
        word, product = "rows", row_products.factors
    else:
        cuts, word, product = OUTPUT_CUTS, "cut", cuda_products.by_outputs
    for decides, rule in (
        (None, None),
        ("gate", prepared(fixed(gates, 0.5), gates, fused=True)),
    ):
        found = []
        for cut in cuts:
            options = {"activation": "silu", "decides": decides, "rule": rule, word: cut}
            calls = [partial(product, x, *two, **options) for two in weights]
            found.append((timed(calls, "cuda", 7), cut))
        for took, cut in sorted(found, key=lambda one: one[0].median)[: arguments.show]:
            print(f"{name} {decides} {took} us {tuple(cut)}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--type", choices=TYPES, default="bf16")
    parser.add_argument("--kernels", choices=["clusters", "triton"], default="clusters")
    parser.add_argument("--show", type=int, default=4)
    parser.add_argument("--output", type=Path, help="JSON file for what is chosen")
    arguments = parser.parse_args()
    dtype = TYPES[arguments.type]
    if arguments.kernels == "triton":
        workers = max(1, min(15, (os.cpu_count() or 2) - 1))
        todo = jobs(dtype)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            failures = [one for one in pool.map(compile_one, todo) if one]
        print(f"compiled {len(todo)}", *failures, sep="\n", flush=True)
    print(machine("cuda"))
    chosen = []
    for name, inputs, outputs, gated in cases():
        cut = best_of(name, inputs, outputs, gated, dtype, arguments)
        chosen.append([inputs, outputs, gated, cut])
        if arguments.output:
            arguments.output.write_text(json.dumps(chosen))
        if gated:
            best_outputs(name, inputs, outputs, dtype, arguments)


if __name__ == "__main__":
    main()
