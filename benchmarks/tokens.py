"""Whole tokens of a model that decodes with sparse maps, over the same model with its own.

    python benchmarks/tokens.py --models 8b 1b
    python benchmarks/tokens.py --device cpu --models tiny --dtype float32

Random weights of Llama's shapes; one step for all layers, head and attention over the context included, which
on a GPU is one recorded graph in both cases. `fixed`: each place has the constant that drops the share of its
entries over a few hundred tokens; `top-p`: a share of the mass, found at each token, that drops about as
much. Rows have masks of their own.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from llama import SHAPES, random_llama
from measure import machine
from sparsity_atlas.decoding.trial import fixed, share_of_mass
from sparsity_atlas.sites.find import find_parts, observe
from sparsity_atlas.sites.part import Vectors
from sparsity_atlas.speed.decoder import Decoder
from sparsity_atlas.speed.replaced import replaced
from sparsity_atlas.speed.timed_rows import Constant
from sparsity_atlas.terms import TENSORS, PlaceKey

# Tokens that the thresholds are taken from.
SEEN = 256
FIND = {"fixed": fixed, "top-p": share_of_mass}


def captured(model: Any, parts: Any, site: str) -> dict[PlaceKey, Tensor]:
    """Vectors of a site's places over some tokens, [tokens, width] each."""
    seen: dict[PlaceKey, list[Tensor]] = defaultdict(list)
    ids = torch.randint(10, model.config.vocab_size, (1, SEEN), device=model.device)

    def keep(found: Vectors) -> None:
        seen[found.key].append(found.values.flatten(0, 1))

    with observe(parts, [site], keep), torch.no_grad():
        model(ids)
    return {key: torch.cat(found) for key, found in seen.items()}


def measure(name: str, arguments: argparse.Namespace) -> None:
    """Print the dense time, and a row for each site, way and share."""
    dtype = getattr(torch, arguments.dtype)
    model = random_llama(name, arguments.device, dtype, max_position_embeddings=8192)
    parts = find_parts(model)
    size = arguments.context + 32
    for rows in arguments.rows:
        dense = Decoder(model, rows, size).timed(arguments.context)
        each = 1e6 * rows / dense.median
        print(
            f"{name}, {rows} rows, context {arguments.context}: dense {dense} us, {each:.1f} tokens/s"
        )
        for site in arguments.sites:
            vectors = captured(model, parts, site)
            for way in arguments.ways:
                for share in arguments.shares:
                    rules = {key: FIND[way](some, share) for key, some in vectors.items()}
                    mask = [
                        1 - rule.mask(vectors[key]).float().mean() for key, rule in rules.items()
                    ]
                    bound = {key: Constant(rule) for key, rule in rules.items()}
                    expected = dict.fromkeys(bound, share)
                    with replaced(model, parts, site, bound, share, expected) as maps:
                        took = Decoder(model, rows, size).timed(arguments.context)
                    print(
                        f"  {site} ({len(TENSORS[site])} tensors), {way}, {float(sum(mask)) / len(mask):.3f} "
                        f"dropped: {took} us, {1e6 * rows / took.median:.1f} tokens/s, "
                        f"{dense.median / took.median:.3f} times; copies {maps.copies / 2**30:.1f} GiB",
                        flush=True,
                    )
                    torch.cuda.empty_cache()


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["8b"], choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--sites", nargs="+", default=["all_linear_inputs", "intermediate"])
    parser.add_argument("--ways", nargs="+", default=list(FIND), choices=list(FIND))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.9])
    arguments = parser.parse_args()
    print(machine(arguments.device))
    for name in arguments.models:
        measure(name, arguments)


if __name__ == "__main__":
    main()
