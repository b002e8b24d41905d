"""Stage `output_error`: induced sparsity and output error at every level, from the store.

No forward pass of the model: each layer's captured input goes through that layer's FFN alone. At an input of
the attention's maps the output is theirs; at all linear inputs at once the error is the mean of the three.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations.store import ActivationStore, read_ahead
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.criteria.level_arguments import add_levels, levels_of
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.models.loading import load
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.terms import PlaceKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.place import Place, State
    from sparsity_atlas.sites.find import Part, Vectors

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


class Output(NamedTuple):
    """An output of a layer that a site changes: the part's, and what the site is to it."""

    part: Part
    site: str

    @property
    def source(self) -> PlaceKey:
        """The captured tensor that it follows from."""
        return PlaceKey(self.part.layer, self.part.name, self.part.source(self.site))


def outputs_at(parts: Iterable[Part], site: str) -> list[Output]:
    """The outputs that a site changes: of attention each tensor's maps for themselves, of an FFN its own."""
    return [Output(part, own) for part in parts for own in part.within(site)]


def sparse_output(
    output: Output, x: Tensor, rules: Mapping[PlaceKey, Criterion], level: float, length: int = 1
) -> tuple[Tensor, int, int]:
    """`Part.run` with a criterion at the output's site.

    Args:
        output: of a layer.
        x: [tokens, width], the tensor `output.source`.
        rules: the criterion as it is bound to each place.
        level: its number.
        length: tokens of a sequence; whole sequences stand one after the other in x.

    Returns:
        output [tokens, outputs], zeros and entries at the site.
    """
    from sparsity_atlas.sparsify.attach import dropping

    zeros = entries = 0

    def drop(vectors: Vectors, onto: Tensor) -> Tensor:
        nonlocal zeros, entries
        values = vectors.values
        shape = (-1, length, values.shape[-1])
        masked = dropping(rules[vectors.key], level)(values.view(shape), onto.view(shape))
        zeros += int(masked.zeros.sum())
        entries += values.numel()
        return masked.out.view(values.shape)

    return output.part.run(x, output.site, drop), zeros, entries


def relative(dense: Tensor, sparse: Tensor) -> tuple[float, int]:
    """Sum over tokens of ‖dense − sparse‖ / ‖dense‖, and of how many; an output of zeros has none."""
    dense = dense.float()
    norm = dense.norm(dim=-1)
    errors = (sparse.float() - dense).norm(dim=-1)[norm > 0] / norm[norm > 0]
    return float(errors.double().sum()), len(errors)


def layer_rows(
    parts: Sequence[Part],
    store: ActivationStore,
    site: str,
    rules: Mapping[PlaceKey, Criterion],
    levels: list[str],
    first: int = 0,
) -> list[dict[str, Any]]:
    """Rows of `SCHEMA` for the parts of one layer, a block of tokens at a time, from the token `first` on."""
    import torch

    layer = parts[0].layer
    tokens = store.shape("input", layer)[0]
    length = store.ids().shape[1]
    widest = max(part.size(tensor) for part in parts for tensor in part.tensors)
    step = max(1, _BLOCK_BYTES // (4 * widest * length)) * length
    changed = outputs_at(parts, site)
    zeros, entries = dict.fromkeys(levels, 0), dict.fromkeys(levels, 0)
    sums = {(level, output): 0.0 for level in levels for output in changed}
    counted = dict.fromkeys(sums, 0)
    parameter = next(parts[-1].readers("intermediate")[0].module.parameters())
    for output in changed:
        places = [slice(start, start + step) for start in range(first, tokens, step)]
        rows = store.rows(output.source.tensor, layer)
        for _, block in read_ahead(rows.__getitem__, places):
            x = torch.from_numpy(block).to(parameter.device, parameter.dtype)
            dense = output.part.run(x, output.site)
            for level in levels:
                made, gone, all_of_them = sparse_output(output, x, rules, float(level), length)
                error, count = relative(dense, made)
                zeros[level] += gone
                entries[level] += all_of_them
                sums[level, output] += error
                counted[level, output] += count
    return [
        {
            "level": level,
            "layer": layer,
            "sparsity": zeros[level] / entries[level],
            "error": _mean([(sums[level, one], counted[level, one]) for one in changed]),
        }
        for level in levels
    ]


def targets(
    criterion: Criterion, places: Sequence[Place], states: Mapping[str, State], level: str
) -> list[dict[str, Any]]:
    """What a level asks of each tensor of a layer, and what that got in calibration; see `SCHEMA`."""
    from sparsity_atlas.criteria.place import state_name

    return [
        {"tensor": place.tensor, **found._asdict()}
        for place in places
        if (found := criterion.reach(states.get(state_name(place.key), {}), float(level)))
        is not None
    ]


def _mean(outputs: list[tuple[float, int]]) -> float | None:
    """Mean over the outputs of a layer of their mean errors.

    None where an output is infinite, or there is none: that level fails in the evaluation, too.
    """
    if not all(count and math.isfinite(error) for error, count in outputs):
        return None
    return sum(error / count for error, count in outputs) / len(outputs)


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
    from sparsity_atlas.criteria.place import places
    from sparsity_atlas.sites.find import bind_parts
    from sparsity_atlas.sites.part import by_layer

    settings = arguments.settings
    model = load(checkpoint, dtype=settings["dtype"], device=settings["device"])
    store = ActivationStore(arguments.store)
    states = read_calibration(arguments.calibration).states if arguments.calibration else {}
    first = settings.get("calibration_tokens", 0)
    rows = []
    parts = bind_parts(model, manifest["ffn"])
    for tensor in sorted({one.source.tensor for one in outputs_at(parts, arguments.site)}):
        store.check(tensor)
    with torch.no_grad():
        for layer in by_layer(parts).values():
            rules = bind_all(criterion, layer, arguments.site, states)
            there = list(places(layer, arguments.site))
            rows += [
                {**row, "targets": targets(criterion, there, states, row["level"])}
                for row in layer_rows(layer, store, arguments.site, rules, levels, first)
            ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_parquet(arguments.output, table)
