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
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from measure import machine
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
from sparsity_atlas.decoding.vector import Vector
from sparsity_atlas.kernels.definition import Threshold

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Hidden and FFN width of Llama 3.2 1B, 3.1 8B and 3.1 70B.
SHAPES = {"1B": (2048, 8192), "8B": (4096, 14336), "70B": (8192, 28672)}
SPARSITIES = (0.0, 0.05, 0.1, 0.3, 0.5, 0.6, 0.7, 0.89)


def map_rows(
    name: str, dtype: torch.dtype, device: str, tokens: int, sparsities: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """Single maps with sparse inputs: an up projection and a down projection."""
    hidden, width = SHAPES[name]
    for label, inputs, outputs in (("up", hidden, width), ("down", width, hidden)):
        layers = layers_of(inputs * outputs, dtype, device)
        maps = [InputMap(matrix(outputs, inputs, dtype, device)) for _ in range(layers)]
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        library = [timed([partial(F.linear, x, one.weight) for one in maps], device)]
        if tokens == 1:
            library.append(timed([partial(torch.mv, one.weight, x[0]) for one in maps], device))
        backend = backend_of(x, maps[0].weight)
        assert backend is not None
        whole = Vector(x)
        calls = [partial(backend.by_inputs, whole, one.transposed, None) for one in maps]
        own = timed(calls, device)
        dense = min(*library, own)
        for rule_name, find in RULES.items():
            for sparsity in sparsities:
                rule = find(x, sparsity)
                found = timed([partial(one, x, rule) for one in maps], device)
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
                calls = [partial(one, x, rule) for one, rule in zip(ffns, rules, strict=True)]
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


def check(device: str, dtypes: list[torch.dtype]) -> bool:
    """Maps and FFNs of odd and real widths against dense products of masked vectors; twice the same
    bits."""
    wrong = 0
    for dtype in dtypes:
        close = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
        for inputs, outputs in ((101, 77), (1000, 3001), (2048, 8192), (14336, 4096)):
            made = InputMap(matrix(outputs, inputs, dtype, device))
            for tokens in (1, 2, 7, 16):
                x = torch.randn(tokens, inputs, device=device).to(dtype)
                for rule in (fixed(x, 0.5), share_of_mass(x, 0.6), Threshold("rank", inputs // 9)):
                    kept = rule.mask(x) * x
                    wanted = F.linear(kept.double(), made.weight.double())
                    found = made(x, rule)
                    off = float((found.double() - wanted).abs().max() / wanted.abs().max())
                    same = torch.equal(found, made(x, rule))
                    if not off <= close or not same:
                        wrong += 1
                        print(f"WRONG {dtype} {inputs} to {outputs}, {tokens}: {off:.1e}, {same}")
        hidden, width = 1024, 2816
        three = [matrix(width, hidden, dtype, device) for _ in range(2)]
        three.append(matrix(hidden, width, dtype, device))
        for site in SITES:
            ffn = GatedFFN(*three, "silu", site)
            for tokens in (1, 5):
                x = torch.randn(tokens, hidden, device=device).to(dtype)
                for find in RULES.values():
                    rules, _ = rules_of(x, ffn, site, find, 0.5)
                    found, wanted = ffn(x, rules), ffn._dense(x, rules)
                    # An entry beside the threshold may go either way in 16 bits.
                    off = float((found - wanted).float().norm() / wanted.float().norm())
                    if not off <= 8 * close or not torch.equal(found, ffn(x, rules)):
                        wrong += 1
                        print(f"WRONG {dtype} FFN {site}, {tokens} tokens: {off:.1e}")
    print(f"check: {wrong} wrong", flush=True)
    return wrong == 0


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
        from sparsity_atlas.decoding import cluster_products, cuda_products

        for inputs, outputs, gated, cut in json.loads(arguments.cuts.read_text()):
            if len(cut) == len(cluster_products.Plan._fields):
                cluster_products.PLANS[inputs, outputs, gated] = cluster_products.Plan(*cut)
            else:
                cuda_products.CUTS[inputs, outputs, gated] = cuda_products.Cut(*cut)
    torch.manual_seed(0)
    print(machine(arguments.device), flush=True)
    wanted = tuple(arguments.sparsities)
    kept: list[dict[str, Any]] = []
    good = (
        check(arguments.device, [TYPES[one] for one in arguments.types])
        if arguments.check
        else True
    )
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
