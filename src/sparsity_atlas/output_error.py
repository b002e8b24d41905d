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
from sparsity_atlas.calibration import read_calibration
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.models import from_manifest, load
from sparsity_atlas.parquet import write_parquet

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    ffn: FFN, x: Tensor, site: str, rules: Mapping[str, Criterion], level: float, length: int = 1
) -> tuple[Tensor, int, int]:
    """An FFN's output with a criterion at a site.

    Args:
        ffn: the layer's FFN.
        x: its input, [tokens, hidden].
        site: where.
        rules: the criterion as it is bound to each tensor of the site in this layer.
        level: its number.
        length: tokens of a sequence; whole sequences stand one after the other in x.

    Returns:
        output [tokens, hidden], zeros and entries at the site.
    """
    from sparsity_atlas.sparsify import dropping

    zeros = entries = 0

    def drop(name: str, values: Tensor, onto: Tensor) -> Tensor:
        nonlocal zeros, entries
        shape = (-1, length, values.shape[-1])
        masked = dropping(rules[name], level)(values.view(shape), onto.view(shape))
        zeros += int(masked.zeros.sum())
        entries += values.numel()
        return masked.out.view(values.shape)

    if site in ("input", "all_inputs"):
        x = drop("input", x, x)
    u, g = ffn.factors(x) if site in ("up", "gate") else (None, None)
    i = ffn.intermediate(x)
    # Dropping an entry of a factor drops the same entry of the product.
    match site:
        case "up":
            i = drop(site, u, i)
        case "gate":
            i = drop(site, g, i)
        case "intermediate" | "all_inputs":
            i = drop("intermediate", i, i)
    return ffn.output(i), zeros, entries


def layer_rows(
    ffn: FFN,
    store: ActivationStore,
    site: str,
    rules: Mapping[str, Criterion],
    levels: list[str],
    first: int = 0,
) -> list[dict[str, Any]]:
    """Rows of `SCHEMA` for one layer, a block of tokens at a time, from the token `first` on."""
    import torch

    tokens = store.shape("input", ffn.layer)[0]
    length = store.ids().shape[1]
    step = max(1, _BLOCK_BYTES // (4 * ffn.width * length)) * length
    sums = {level: {"zeros": 0, "entries": 0, "error": 0.0} for level in levels}
    counted = 0
    parameter = next(ffn.down.module.parameters())
    for start in range(first, tokens, step):
        block = torch.from_numpy(store.read("input", ffn.layer, start, start + step))
        x = block.to(parameter.device, parameter.dtype)
        dense = ffn.output(ffn.intermediate(x))
        norm = dense.float().norm(dim=-1)
        counted += int((norm > 0).sum())
        for level in levels:
            output, zeros, entries = sparse_output(ffn, x, site, rules, float(level), length)
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
    cli.add_levels(parser)
    parser.add_argument(
        "--calibration", type=cli.optional_path, help="calibration of the criterion, if it has one"
    )
    parser.add_argument(
        "--settings",
        required=True,
        type=json.loads,
        help="JSON: model loading, calibration tokens (these are left out)",
    )
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()

    criterion = create(arguments.criterion)
    levels = cli.levels_of(arguments)
    for level in levels:
        check_level(criterion, level)
    manifest, checkpoint = from_manifest(arguments.model)
    import torch

    from sparsity_atlas.place import bind_all
    from sparsity_atlas.sites import bind_ffns

    settings = arguments.settings
    model = load(checkpoint, dtype=settings["dtype"], device=settings["device"])
    store = ActivationStore(arguments.store)
    store.check("input")
    states = read_calibration(arguments.calibration).states if arguments.calibration else None
    first = settings.get("calibration_tokens", 0)
    rows = []
    with torch.no_grad():
        for ffn in bind_ffns(model, manifest["ffn"]):
            bound = bind_all(criterion, [ffn], arguments.site, states)
            rules = {tensor: rule for (_, tensor), rule in bound.items()}
            rows += layer_rows(ffn, store, arguments.site, rules, levels, first)
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_parquet(arguments.output, table)


if __name__ == "__main__":
    cli.run(main)
