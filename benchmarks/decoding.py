"""What zeros are worth in one step of decoding: maps and whole FFNs against dense products.

    python benchmarks/decoding.py --device cuda --check --tune
    python benchmarks/decoding.py --device cpu --shapes 8B --types fp32 bf16

Caches are cold: every call meets another layer's weights, of which there are several times the last cache.
On a GPU the calls of all layers are one captured graph. Times are medians over its replays, with the
distance between their quartiles; dense is the better of the library's products and of our own kernels
where nothing is dropped.

r, the realised share, is (1 - sparse / dense) / share of weight bytes that need not be read.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import machine
from sparsity_atlas.decoding import cluster_products
from sparsity_atlas.decoding.backend import backend_of
from sparsity_atlas.decoding.maps import SITES, GatedFFN, InputMap
from sparsity_atlas.decoding.trial import (
    RULES,
    Time,
    dense_ffn,
    fixed,
    layers_of,
    matrix,
    own_ffn,
    realised,
    rules_of,
    share_of_mass,
    timed,
    unread,
)
from sparsity_atlas.decoding.vector import Keep, Vector, prepared
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.terms import TENSORS

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Hidden and FFN width of Llama 3.2 1B, 3.1 8B and 3.1 70B.
SHAPES = {"1B": (2048, 8192), "8B": (4096, 14336), "70B": (8192, 28672)}
# What their queries, keys and values have together.
ATTENTION = {"1B": 3072, "8B": 6144, "70B": 10240}
# Of a result's largest entry: one rounding of the type, and float32 sums.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SPARSITIES = (0.0, 0.05, 0.1, 0.3, 0.5, 0.6, 0.7, 0.89)


def map_rows(
    name: str, dtype: torch.dtype, device: str, tokens: int, sparsities: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """Single maps with sparse inputs: an up projection and a down projection, and attention's."""
    hidden, width = SHAPES[name]
    shapes = {"up": (hidden, width), "down": (width, hidden)}
    shapes |= {"qkv": (hidden, ATTENTION[name]), "o": (hidden, hidden)}
    for label, (inputs, outputs) in shapes.items():
        layers = layers_of(inputs * outputs, dtype, device)
        maps = [InputMap(matrix(outputs, inputs, dtype, device)) for _ in range(layers)]
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        library = [timed([partial(F.linear, x, one.weight) for one in maps], device)]
        if tokens == 1:
            library.append(timed([partial(torch.mv, one.weight, x[0]) for one in maps], device))
        backend = backend_of(x, maps[0].weight)
        assert backend is not None
        whole = Vector(x, expected=0.0)
        calls = [partial(backend.by_inputs, whole, one.transposed, None) for one in maps]
        own = timed(calls, device)
        dense = min(*library, own)
        for rule_name, find in RULES.items():
            for sparsity in sparsities:
                rule = find(x, sparsity)
                found = timed([partial(one, x, rule, sparsity) for one in maps], device)
                share = unread(rule.mask(x))
                yield {
                    **{"what": label, "rule": rule_name, "tokens": tokens, "dense": dense},
                    **{"library": min(library), "own": own, "sparse": found, "share": share},
                }
        del maps


def ffn_rows(
    name: str, dtype: torch.dtype, device: str, tokens: int, sparsities: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """Whole gated FFNs, each site by fixed and by found thresholds."""
    hidden, width = SHAPES[name]
    layers = layers_of(3 * hidden * width, dtype, device)
    weights = [
        (
            *(matrix(width, hidden, dtype, device) for _ in range(2)),
            matrix(hidden, width, dtype, device),
        )
        for _ in range(layers)
    ]
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    dense = None
    for site in SITES:
        ffns = [GatedFFN(*three, "silu", site) for three in weights]
        if dense is None:
            library = timed([partial(dense_ffn, x, one) for one in ffns], device)
            own = timed([partial(own_ffn, x, one) for one in ffns], device)
            dense = min(library, own)
        for rule_name, find in RULES.items():
            for sparsity in sparsities:
                rules, share = zip(
                    *(rules_of(x, one, site, find, sparsity) for one in ffns), strict=True
                )
                expected = dict.fromkeys(TENSORS[site], sparsity)
                calls = [
                    partial(one, x, rule, expected) for one, rule in zip(ffns, rules, strict=True)
                ]
                yield {
                    **{"what": f"FFN {site}", "rule": rule_name, "tokens": tokens},
                    **{"dense": dense, "library": library, "own": own},
                    **{"sparse": timed(calls, device), "share": statistics.mean(share)},
                }
        del ffns


def show(rows: Iterator[dict[str, Any]], name: str, dtype: str, kept: list[dict[str, Any]]) -> None:
    """Print rows as they come."""
    for row in rows:
        dense, sparse = row["dense"].median, row["sparse"].median
        r = realised(dense, sparse, row["share"])
        print(
            f"{name:>3} {dtype} {row['what']:<18} {row['rule']:<6} B={row['tokens']:<2} "
            f"unread {row['share']:5.1%} | library {row['library'].median:8.1f} own at 0 "
            f"{row['own'].median:8.1f} | {row['sparse']} us | {dense / sparse:5.2f}x"
            + ("" if r is None else f" of {1 / (1 - row['share']):.2f}x, r {r:.2f}"),
            flush=True,
        )
        plain = {key: tuple(one) if isinstance(one, Time) else one for key, one in row.items()}
        kept.append({"shape": name, "type": dtype, **plain})


def check_map(device: str, kind: str, inputs: int, outputs: int) -> list[str]:
    """What is wrong with a map: against the dense product of the masked vector; twice the same bits."""
    dtype, wrong = TYPES[kind], []
    made = InputMap(matrix(outputs, inputs, dtype, device))
    for tokens in (1, 2, 7, 16):
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        weights = torch.rand(inputs, device=device) + 0.5
        weighted = Threshold("share", 0.6, weights=weights)
        by_rank = Threshold("rank", inputs // 9)
        for rule in (fixed(x, 0.5), share_of_mass(x, 0.6), by_rank, weighted):
            kept = rule.mask(x) * x
            wanted = F.linear(kept.double(), made.weight.double())
            found = made(x, rule)
            off = float((found.double() - wanted).abs().max() / wanted.abs().max())
            if not off <= CLOSE[dtype] or not torch.equal(found, made(x, rule)):
                wrong.append(f"{tokens} tokens, {rule.kind}: {off:.1e}")
    return wrong


def check_plans(device: str, kind: str, inputs: int, outputs: int, gated: bool) -> list[str]:
    """What is wrong with a product by any of its plans: against float64; twice the same bits."""
    dtype, wrong = TYPES[kind], []
    maps = [matrix(inputs, outputs, dtype, device) for _ in range(1 + gated)]
    for plan in cluster_products.PLANS[inputs, outputs, gated].values():
        for sparsity in (0.0, 0.05, 0.5, 0.89, 0.999):
            x = torch.randn(1, inputs, device=device).to(dtype)
            rule = fixed(x, sparsity)
            kept = (rule.mask(x) * x).double()
            u, *g = ((kept @ one.double()).to(dtype).double() for one in maps)
            wanted = u * F.silu(g[0]) if gated else u

            def made(x: Tensor = x, rule: Threshold = rule, plan: Any = plan) -> Tensor:
                vector, activation = prepared(rule, x, fused=True), "silu" if gated else None
                return cluster_products.by_inputs(vector, *maps, activation=activation, plan=plan)

            found = made()
            off = float((found.double() - wanted).abs().max() / wanted.abs().max())
            if not off <= 4 * CLOSE[dtype] or not torch.equal(found, made()):
                wrong.append(f"{tuple(plan)}, {sparsity}: {off:.1e}")
    return wrong


def check_search(device: str, kind: str, inputs: int, outputs: int) -> list[str]:
    """What is wrong where a threshold is found at each token: other bits than of a vector that the definition
    masked."""
    dtype, wrong = TYPES[kind], []
    made = InputMap(matrix(outputs, inputs, dtype, device))
    backend = backend_of(torch.zeros(1, inputs, dtype=dtype, device=device), made.weight)
    assert backend is not None
    x = torch.randn(1, inputs, device=device)
    vectors = {"normal": x, "heavy tails": x**3, "ties": (4 * x).round() / 4, "zero": 0 * x}
    vectors |= {"tiny": 1e-7 * x, "huge": 9e3 * x, "one": torch.where(x == x.max(), x, 0)}
    vectors["not finite"] = torch.where(x == x.max(), torch.nan, x)
    vectors |= {f"normal {i}": torch.randn(1, inputs, device=device) for i in range(12)}
    for name, values in vectors.items():
        one = values.to(dtype)
        for amount in (0.5, 0.8, 0.99):
            for weights in (None, torch.rand(inputs, device=device) + 0.5):
                rule = Threshold("share", amount, weights=weights)
                before = Vector(torch.where(rule.mask(one), one, 0), Keep.NONZERO)
                wanted = backend.by_inputs(before, made.transposed, None)
                found = backend.by_inputs(prepared(rule, one, fused=True), made.transposed, None)
                if not torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)):
                    wrong.append(f"{name}, {amount}, weights {weights is not None}: other bits")
    return wrong


def check_ffn(device: str, kind: str, site: str) -> list[str]:
    """What is wrong with a gated FFN."""
    dtype, wrong = TYPES[kind], []
    hidden, width = 1024, 2816
    three = [matrix(width, hidden, dtype, device) for _ in range(2)]
    three.append(matrix(hidden, width, dtype, device))
    ffn = GatedFFN(*three, "silu", site)
    for tokens in (1, 5):
        x = torch.randn(tokens, hidden, device=device).to(dtype)
        for name, find in RULES.items():
            rules, _ = rules_of(x, ffn, site, find, 0.5)
            found, wanted = ffn(x, rules), ffn._dense(x, rules)
            # An entry beside the threshold may go either way in 16 bits.
            off = float((found - wanted).float().norm() / wanted.float().norm())
            if not off <= 8 * CLOSE[dtype] or not torch.equal(found, ffn(x, rules)):
                wrong.append(f"{tokens} tokens, {name}: {off:.1e}")
    return wrong


def check_one(case: tuple[Callable[..., list[str]], tuple[Any, ...]]) -> tuple[str, list[str]]:
    """Name and findings of one check, in a process of its own on a GPU."""
    call, arguments = case
    torch.manual_seed(0)
    start = time.monotonic()
    wrong = call(*arguments)
    name = " ".join(map(str, arguments[1:]))
    return f"{call.__name__} {name}: {time.monotonic() - start:.0f} s", wrong


def check(device: str, kinds: list[str]) -> bool:
    """Maps and FFNs of odd and real widths; each process compiles what it needs."""
    shapes = ((101, 77), (1000, 3001), (2048, 8192), (14336, 4096))
    cases: list[tuple[Callable[..., list[str]], tuple[Any, ...]]] = []
    for kind in kinds:
        cases += [(check_map, (device, kind, *shape)) for shape in shapes[::-1]]
        cases += [(check_ffn, (device, kind, site)) for site in SITES]
        if device == "cuda":
            known = (*cluster_products.PLANS, (1000, 1000, False), (8192, 28672, False))
            maps = dict.fromkeys((inputs, outputs) for inputs, outputs, _ in known)
            cases += [(check_search, (device, kind, *shape)) for shape in maps]
            if TYPES[kind].itemsize == 2:
                cases += [(check_plans, (device, kind, *shape)) for shape in cluster_products.PLANS]
    failed = 0
    if device == "cuda":
        workers = max(1, min(14, (os.cpu_count() or 2) - 1, len(cases)))
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        results: Iterator[tuple[str, list[str]]] = pool.map(check_one, cases)
    else:
        results = map(check_one, cases)
    for name, wrong in results:
        failed += len(wrong)
        print(f"{name}, {'WRONG' if wrong else 'right'}", *wrong, sep="\n    ", flush=True)
    print(f"check: {failed} wrong", flush=True)
    return failed == 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["bf16"])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--batches", nargs="*", type=int, default=[])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--cuts", type=Path, help="what `decoding_tune.py` chose")
    arguments = parser.parse_args()
    if arguments.cuts:
        from sparsity_atlas.decoding import cuda_products

        for inputs, outputs, gated, cut in json.loads(arguments.cuts.read_text()):
            if isinstance(cut, dict):
                plans = {float(least): cluster_products.Plan(*one) for least, one in cut.items()}
                cluster_products.PLANS[inputs, outputs, gated] = plans
            else:
                cuda_products.CUTS[inputs, outputs, gated] = cuda_products.Cut(*cut)
    torch.manual_seed(0)
    print(machine(arguments.device), flush=True)
    wanted = tuple(arguments.sparsities)
    kept: list[dict[str, Any]] = []
    good = check(arguments.device, arguments.types) if arguments.check else True
    for dtype in arguments.types:
        for name in arguments.shapes:
            kind = TYPES[dtype]
            show(map_rows(name, kind, arguments.device, 1, wanted), name, dtype, kept)
            show(ffn_rows(name, kind, arguments.device, 1, wanted), name, dtype, kept)
            for tokens in arguments.batches:
                rows = ffn_rows(name, kind, arguments.device, tokens, (0.5, 0.89))
                show(rows, name, dtype, kept)
            if arguments.json:
                arguments.json.write_text(json.dumps(kept))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
