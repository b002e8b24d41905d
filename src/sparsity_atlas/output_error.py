"""Stage `output_error`: induced sparsity and FFN-output error at every level, from the store.

No forward pass of the model: each layer's captured input goes through that layer's FFN alone.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations import ActivationStore
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.models import from_manifest, load
from sparsity_atlas.parquet import write_parquet
from sparsity_atlas.store import read_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.sites import FFN

SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("layer", pa.int64()),
        ("sparsity", pa.float64()),  # zeros / entries at the site
        ("error", pa.float64()),  # mean over tokens of ‖FFN(x) − FFN_sparse(x)‖ / ‖FFN(x)‖
    ]
)
_BLOCK_BYTES = 64 * 2**20


def sparse_output(
    ffn: FFN, x: Tensor, site: str, criterion: Criterion, level: float
) -> tuple[Tensor, int, int]:
    """An FFN's output with a criterion at a site.

    Args:
        ffn: the layer's FFN.
        x: its input, [tokens, hidden].
        site: where.
        criterion: the rule.
        level: its number.

    Returns:
        output [tokens, hidden], zeros and entries at the site.
    """
    from sparsity_atlas.sparsify import exact_mask

    zeros = entries = 0

    def drop(values: Tensor, onto: Tensor) -> Tensor:
        nonlocal zeros, entries
        mask = exact_mask(criterion, values, level)
        zeros += int((~mask | (values == 0)).sum())
        entries += values.numel()
        return onto.masked_fill(~mask, 0)

    if site in ("input", "all_inputs"):
        x = drop(x, x)
    u, g = ffn.factors(x) if site in ("up", "gate") else (None, None)
    i = ffn.intermediate(x)
    # Dropping an entry of a factor drops the same entry of the product.
    match site:
        case "up":
            i = drop(u, i)
        case "gate":
            i = drop(g, i)
        case "intermediate" | "all_inputs":
            i = drop(i, i)
    return ffn.output(i), zeros, entries


def layer_rows(
    ffn: FFN, store: ActivationStore, site: str, criterion: Criterion, levels: list[str]
) -> list[dict[str, Any]]:
    """Rows of `SCHEMA` for one layer, a block of tokens at a time."""
    import torch

    tokens = store.shape("input", ffn.layer)[0]
    step = max(1, _BLOCK_BYTES // (4 * ffn.width))
    sums = {level: {"zeros": 0, "entries": 0, "error": 0.0} for level in levels}
    counted = 0
    parameter = next(ffn.down.module.parameters())
    for start in range(0, tokens, step):
        block = torch.from_numpy(store.read("input", ffn.layer, start, start + step))
        x = block.to(parameter.device, parameter.dtype)
        dense = ffn.output(ffn.intermediate(x))
        norm = dense.float().norm(dim=-1)
        counted += int((norm > 0).sum())
        for level in levels:
            output, zeros, entries = sparse_output(ffn, x, site, criterion, float(level))
            error = (output - dense).float().norm(dim=-1)[norm > 0] / norm[norm > 0]
            sums[level]["zeros"] += zeros
            sums[level]["entries"] += entries
            sums[level]["error"] += float(error.double().sum())
    return [
        {
            "level": level,
            "layer": ffn.layer,
            "sparsity": one["zeros"] / one["entries"],
            # Not a number where an output is infinite: that level fails in the evaluation, too.
            "error": one["error"] / counted if counted and math.isfinite(one["error"]) else None,
        }
        for level, one in sums.items()
    ]


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_atlas.output_error", description=__doc__
    )
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--site", required=True)
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    parser.add_argument("--levels", default="", help="comma-separated")
    parser.add_argument(
        "--search", type=cli.optional_path, help="search.json whose levels are taken as well"
    )
    parser.add_argument("--settings", required=True, type=json.loads, help="JSON: model loading")
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()

    criterion = create(arguments.criterion)
    levels = [level for level in arguments.levels.split(",") if level]
    if arguments.search:
        levels += [one["level"] for one in read_manifest(arguments.search)["levels"]]
    levels = sorted(set(levels), key=float, reverse=True)
    for level in levels:
        check_level(criterion, level)
    manifest, folder = from_manifest(arguments.model)
    import torch

    from sparsity_atlas.sites import bind_ffns

    model = load(folder, dtype=arguments.settings["dtype"], device=arguments.settings["device"])
    store = ActivationStore(arguments.store)
    store.check("input")
    with torch.no_grad():
        rows = [
            row
            for ffn in bind_ffns(model, manifest["ffn"])
            for row in layer_rows(ffn, store, arguments.site, criterion, levels)
        ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_parquet(arguments.output, table)


if __name__ == "__main__":
    cli.run(main)
