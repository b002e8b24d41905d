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
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import machine
from sparsity_atlas.decoding.backend import backend_of
from sparsity_atlas.decoding.maps import SITES, GatedFFN, InputMap
from sparsity_atlas.decoding.vector import Vector
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.terms import TENSORS

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Hidden and FFN width of Llama 3.2 1B, 3.1 8B and 3.1 70B.
SHAPES = {"1B": (2048, 8192), "8B": (4096, 14336), "70B": (8192, 28672)}
SPARSITIES = (0.0, 0.05, 0.1, 0.3, 0.5, 0.6, 0.7, 0.89)
# Bytes of weights that one round meets: several times the last cache.
COLD = {"cuda": 400e6, "cpu": 200e6}


class Time(NamedTuple):
    """Microseconds a call: the median (on a CPU the least), and the distance between the quartiles."""

    median: float
    spread: float

    def __str__(self) -> str:
        return f"{self.median:8.1f} ±{self.spread:4.1f}"


def timed(calls: list[Callable[[], object]], device: str, repeats: int = 20) -> Time:
    """Time of one of some calls that are run one after another."""
    if device == "cpu":
        times = []
        calls[0]()
        for _ in range(repeats // 2):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append(time.perf_counter() - start)
    else:
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for start_event, end_event in events:
            start_event.record()
            graph.replay()
            end_event.record()
        torch.cuda.synchronize()
        times = [one.elapsed_time(other) / 1e3 for one, other in events]
    each = sorted(one * 1e6 / len(calls) for one in times)
    low, _, high = statistics.quantiles(each, n=4)
    # Other work on a CPU only ever adds to it.
    return Time(statistics.median(each) if device == "cuda" else each[0], high - low)


def layers_of(weights: int, dtype: torch.dtype, device: str) -> int:
    """How many layers of so many weights are met in a round."""
    fewest = 3 if device == "cuda" else 1
    return max(fewest, round(COLD[device] / (weights * dtype.itemsize)))


def matrix(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """A weight [rows, columns] that keeps the size of what it multiplies."""
    return (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype)


def fixed(values: Tensor, sparsity: float) -> Threshold:
    """The constant that drops this share of some entries, between two of them."""
    ranked = values.abs().float().flatten().sort().values
    rank = min(max(int(sparsity * len(ranked)), 1), len(ranked) - 1)
    cut = ranked[rank - 1 : rank + 1].mean() if sparsity > 0 else 0 * ranked[0]
    return Threshold("fixed", constants=cut[None])


def share_of_mass(values: Tensor, sparsity: float) -> Threshold:
    """Top-p that drops about this share of some entries."""
    ranked = values.abs().float().sort(-1, descending=True).values
    kept = min(max(int((1 - sparsity) * ranked.shape[-1]), 1), ranked.shape[-1])
    # In the middle of an entry, so that rounding moves none across.
    shares = (ranked[:, :kept].sum(-1) - ranked[:, kept - 1] / 2) / ranked.sum(-1)
    return Threshold("share", float(shares.mean()) if sparsity > 0 else 1.0)


RULES = {"fixed": fixed, "top-p": share_of_mass}


def unread(mask: Tensor) -> float:
    """Share of the rows that no token keeps: mask [tokens, width]."""
    return float((~mask).all(0).float().mean())


def realised(dense: float, sparse: float, share: float) -> float | None:
    """r; None where nothing is left out."""
    return (1 - sparse / dense) / share if share > 0.02 else None


def map_rows(name: str, dtype: torch.dtype, device: str, tokens: int) -> Iterator[dict[str, Any]]:
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
            for sparsity in SPARSITIES:
                rule = find(x, sparsity)
                found = timed([partial(one, x, rule) for one in maps], device)
                share = unread(rule.mask(x))
                yield {
                    **{"what": label, "rule": rule_name, "tokens": tokens, "dense": dense},
                    **{"library": min(library), "own": own, "sparse": found, "share": share},
                }
        del maps


def dense_ffn(x: Tensor, ffn: GatedFFN) -> Tensor:
    """By the library's products."""
    return F.linear(F.silu(F.linear(x, ffn.gate)) * F.linear(x, ffn.up), ffn.down)


def own_ffn(x: Tensor, ffn: GatedFFN) -> Tensor:
    """By our kernels, with nothing dropped."""
    backend = backend_of(x, ffn.up)
    assert backend is not None
    return F.linear(backend.factors(x, ffn.up, ffn.gate, "silu"), ffn.down)


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
                    *(ffn_rules(x, one, site, find, sparsity) for one in ffns), strict=True
                )
                calls = [partial(one, x, rule) for one, rule in zip(ffns, rules, strict=True)]
                yield {
                    **{"what": f"FFN {site}", "rule": rule_name, "tokens": tokens},
                    **{"dense": dense, "library": library, "own": own},
                    **{"sparse": timed(calls, device), "share": statistics.mean(share)},
                }
        del ffns


def ffn_rules(
    x: Tensor, ffn: GatedFFN, site: str, find: Callable[[Tensor, float], Threshold], sparsity: float
) -> tuple[dict[str, Threshold], float]:
    """Rules of a layer, and the share of its weights that need not be read."""
    rules, share, seen = {}, 0.0, x
    for tensor in TENSORS[site]:
        if tensor == "input":
            values = x
        else:
            u, g = F.linear(seen, ffn.up), F.silu(F.linear(seen, ffn.gate))
            values = {"up": u, "gate": g, "intermediate": u * g}[tensor]
        rules[tensor] = find(values, sparsity)
        mask = rules[tensor].mask(values)
        # Of three maps that are equally large.
        share += unread(mask) * (1 if tensor == "intermediate" else 2) / 3
        seen = torch.where(mask, values, 0) if tensor == "input" else seen
    return rules, share


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
                    rules, _ = ffn_rules(x, ffn, site, find, 0.5)
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
    parser.add_argument("--batches", nargs="*", type=int, default=[])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--cuts", type=Path, help="what `decoding_tune.py` chose")
    arguments = parser.parse_args()
    if arguments.cuts:
        from sparsity_atlas.decoding import cuda_products

        for inputs, outputs, gated, cut in json.loads(arguments.cuts.read_text()):
            cuda_products.CUTS[inputs, outputs, gated] = cuda_products.Cut(*cut)
    torch.manual_seed(0)
    print(machine(arguments.device), flush=True)
    kept: list[dict[str, Any]] = []
    good = (
        check(arguments.device, [TYPES[one] for one in arguments.types])
        if arguments.check
        else True
    )
    for dtype in arguments.types:
        for name in arguments.shapes:
            kind = TYPES[dtype]
            show(map_rows(name, kind, arguments.device, 1), name, dtype, kept)
            show(ffn_rows(name, kind, arguments.device, 1, SPARSITIES), name, dtype, kept)
            for tokens in arguments.batches:
                rows = ffn_rows(name, kind, arguments.device, tokens, (0.5, 0.89))
                show(rows, name, dtype, kept)
            if arguments.json:
                arguments.json.write_text(json.dumps(kept))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
