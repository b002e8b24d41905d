"""Stage `output_error`: induced sparsity and output error at every level, from the store.

No forward pass of the model: each layer's captured input goes through that layer's FFN alone. At an input of
the attention's maps the output is theirs; at all linear inputs at once the error is the mean of the three.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations.store import ActivationStore, read_ahead
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.criteria.level_arguments import add_levels, levels_of
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.models.loading import load
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.terms import TENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.place import State
    from sparsity_atlas.sites.find import FFN

SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("layer", pa.int64()),
        ("sparsity", pa.float64()),  # zeros / entries at the site
        ("error", pa.float64()),  # mean over tokens of ‖f(x) − f_sparse(x)‖ / ‖f(x)‖
        # Of a calibrated criterion: what the level asks of each tensor, and what that got in calibration.
        (
            "targets",
            pa.list_(
                pa.struct(
                    [
                        ("tensor", pa.string()),
                        ("of", pa.string()),
                        ("target", pa.float64()),
                        ("reached", pa.float64()),
                    ]
                )
            ),
        ),
    ]
)
_BLOCK_BYTES = 64 * 2**20


# Sites whose error is the mean of those of several parts of a layer.
_PARTS = {"all_linear_inputs": ("qkv_input", "o_input", "all_inputs")}


def parts_of(site: str) -> tuple[str, ...]:
    """The parts of a layer that a site concerns: attention's maps each for themselves, and the FFN."""
    return _PARTS.get(site, (site,))


def source_of(part: str) -> str:
    """The captured tensor that a part's output follows from."""
    return part if part in ("qkv_input", "o_input") else "input"


def dense_output(ffn: FFN, x: Tensor, part: str) -> Tensor:
    """What a part of a layer makes of its input.

    Args:
        ffn: the layer's FFN.
        x: [tokens, width], the tensor `source_of(part)`.
        part: of the layer.

    Returns:
        The FFN's output [tokens, hidden], or the outputs of the maps that read x, side by side.
    """
    import torch

    if source_of(part) == "input":
        return ffn.output(ffn.intermediate(x))
    return torch.cat([projection(x) for projection in ffn.readers(part)], dim=-1)


def sparse_output(
    ffn: FFN, x: Tensor, part: str, rules: Mapping[str, Criterion], level: float, length: int = 1
) -> tuple[Tensor, int, int]:
    """`dense_output` with a criterion at the part's site.

    Args:
        ffn: the layer's FFN.
        x: [tokens, width], the tensor `source_of(part)`.
        part: of the layer, and the site there.
        rules: the criterion as it is bound to each tensor of the site in this layer.
        level: its number.
        length: tokens of a sequence; whole sequences stand one after the other in x.

    Returns:
        output [tokens, outputs], zeros and entries at the site.
    """
    from sparsity_atlas.sparsify.attach import dropping

    zeros = entries = 0

    def drop(name: str, values: Tensor, onto: Tensor) -> Tensor:
        nonlocal zeros, entries
        shape = (-1, length, values.shape[-1])
        masked = dropping(rules[name], level)(values.view(shape), onto.view(shape))
        zeros += int(masked.zeros.sum())
        entries += values.numel()
        return masked.out.view(values.shape)

    if source_of(part) != "input":
        return dense_output(ffn, drop(part, x, x), part), zeros, entries
    if part in ("input", "all_inputs"):
        x = drop("input", x, x)
    i = ffn.intermediate(x)
    # Dropping an entry of a factor drops the same entry of the product.
    match part:
        case "up":
            i = drop(part, ffn.factors(x)[0], i)
        case "gate":
            _, g = ffn.factors(x)
            assert g is not None, "a site of gated FFNs alone"
            i = drop(part, g, i)
        case "intermediate" | "all_inputs":
            i = drop("intermediate", i, i)
    return ffn.output(i), zeros, entries


def relative(dense: Tensor, sparse: Tensor) -> tuple[float, int]:
    """Sum over tokens of ‖dense − sparse‖ / ‖dense‖, and of how many; an output of zeros has none."""
    dense = dense.float()
    norm = dense.norm(dim=-1)
    errors = (sparse.float() - dense).norm(dim=-1)[norm > 0] / norm[norm > 0]
    return float(errors.double().sum()), len(errors)


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
    parts = parts_of(site)
    zeros, entries = dict.fromkeys(levels, 0), dict.fromkeys(levels, 0)
    sums = {(level, part): 0.0 for level in levels for part in parts}
    counted = dict.fromkeys(sums, 0)
    parameter = next(ffn.down.module.parameters())
    for part in parts:
        places = [slice(start, start + step) for start in range(first, tokens, step)]
        for _, block in read_ahead(store.rows(source_of(part), ffn.layer).__getitem__, places):
            x = torch.from_numpy(block).to(parameter.device, parameter.dtype)
            dense = dense_output(ffn, x, part)
            for level in levels:
                output, gone, all_of_them = sparse_output(ffn, x, part, rules, float(level), length)
                error, count = relative(dense, output)
                zeros[level] += gone
                entries[level] += all_of_them
                sums[level, part] += error
                counted[level, part] += count
    return [
        {
            "level": level,
            "layer": ffn.layer,
            "sparsity": zeros[level] / entries[level],
            "error": _mean([(sums[level, part], counted[level, part]) for part in parts]),
        }
        for level in levels
    ]


def targets(
    criterion: Criterion, layer: int, site: str, states: Mapping[str, State], level: str
) -> list[dict[str, Any]]:
    """What a level asks of each tensor of a layer, and what that got in calibration; see `SCHEMA`."""
    return [
        {"tensor": tensor, **found._asdict()}
        for tensor in TENSORS[site]
        if (found := criterion.reach(states.get(f"{tensor}.{layer}", {}), float(level))) is not None
    ]


def _mean(parts: list[tuple[float, int]]) -> float | None:
    """Mean over the parts of a layer of their mean errors.

    None where an output is infinite, or there is none: that level fails in the evaluation, too.
    """
    if not all(count and math.isfinite(error) for error, count in parts):
        return None
    return sum(error / count for error, count in parts) / len(parts)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas output_error", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--site", required=True)
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    add_levels(parser)
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
    levels = levels_of(arguments)
    for level in levels:
        check_level(criterion, level)
    manifest, checkpoint = from_manifest(arguments.model)
    import torch

    from sparsity_atlas.criteria.binding import bind_all
    from sparsity_atlas.sites.find import bind_ffns

    settings = arguments.settings
    model = load(checkpoint, dtype=settings["dtype"], device=settings["device"])
    store = ActivationStore(arguments.store)
    for tensor in sorted({source_of(part) for part in parts_of(arguments.site)}):
        store.check(tensor)
    states = read_calibration(arguments.calibration).states if arguments.calibration else {}
    first = settings.get("calibration_tokens", 0)
    rows = []
    with torch.no_grad():
        for ffn in bind_ffns(model, manifest["ffn"]):
            bound = bind_all(criterion, [ffn], arguments.site, states)
            rules = {tensor: rule for (_, tensor), rule in bound.items()}
            rows += [
                {
                    **row,
                    "targets": targets(criterion, ffn.layer, arguments.site, states, row["level"]),
                }
                for row in layer_rows(ffn, store, arguments.site, rules, levels, first)
            ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_parquet(arguments.output, table)
