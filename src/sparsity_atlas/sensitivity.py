"""Stage `sensitivity`: what each layer costs by itself, one tensor of one layer at a time.

The captured text's tokens run through the model, of calibrated criteria and all others those that no
calibration looked at; next-token loss against the dense model's on the same sequences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations import ActivationStore
from sparsity_atlas.bootstrap import TaskSamples, estimate, percentile_interval
from sparsity_atlas.calibration import read_calibration
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.models import from_manifest, load
from sparsity_atlas.parquet import write_parquet
from sparsity_atlas.terms import TENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.single_layer import Pass
    from sparsity_atlas.sites import FFN

SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("tensor", pa.string()),
        ("layer", pa.int64()),
        (
            "sparsity",
            pa.float64(),
        ),  # of this tensor in this layer; null: NaN or an infinity came up
        ("added_loss", pa.float64()),  # nats per token above the dense model's
        ("added_loss_low", pa.float64()),  # 95 % interval by paired bootstrap over the sequences
        ("added_loss_high", pa.float64()),
    ]
)


def numbers(
    passes: Sequence[Pass | None],
    dense: np.ndarray,
    positions: int,
    width: int,
    replicates: int,
    seed: int,
) -> Iterator[dict[str, float | None]]:
    """Sparsity and added loss of one place at each level, as `SCHEMA` has them.

    Args:
        passes: of each level.
        dense: [sequences], nats of the dense model.
        positions: tokens of a sequence, of which the first is not predicted.
        width: entries of the place's vector.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    failed = np.full(len(dense), np.nan), np.zeros(len(dense), dtype=np.int64)
    nats, zeros = map(np.array, zip(*(one or failed for one in passes), strict=True))
    known = np.isfinite(nats).all(axis=1)
    entries = np.repeat(np.where(known, positions * width, 0)[:, None], len(dense), axis=1)
    weight = np.full(len(dense), positions - 1)
    samples = TaskSamples("sensitivity", "loss", nats, weight, dense, zeros, entries)
    found = estimate(samples, replicates, seed)
    added = found.relative()
    low, high = percentile_interval(added[1:]) if len(added) > 1 else (added[0] * np.nan,) * 2
    for place in zip(found.sparsity[0], added[0], low, high, strict=True):
        values = (float(number) if np.isfinite(number) else None for number in place)
        yield dict(zip(SCHEMA.names[3:], values, strict=True))


def measure(
    ffns: list[FFN],
    site: str,
    bound: Mapping[tuple[int, str], Criterion],
    levels: Sequence[str],
    ids: Tensor,
    replicates: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of `SCHEMA` for every place of a site.

    Args:
        ffns: all FFNs of one model.
        site: where.
        bound: the criterion at every place, by layer and tensor.
        levels: of the criterion, as spelled in paths.
        ids: int64 [sequences, positions].
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    from sparsity_atlas.single_layer import run, run_alone

    dense = run(ffns[0].model, ids).nats
    widths = {(ffn.layer, tensor): ffn.size(tensor) for ffn in ffns for tensor in TENSORS[site]}
    for place, rule in bound.items():
        layer, tensor = place
        passes = run_alone(ffns, site, place, rule, [float(level) for level in levels], ids)
        found = numbers(passes, dense, ids.shape[1], widths[place], replicates, seed)
        for level, row in zip(levels, found, strict=True):
            yield {"level": level, "tensor": tensor, "layer": layer, **row}


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_atlas.sensitivity", description=__doc__
    )
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--site", required=True)
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    parser.add_argument("--levels", required=True, help="comma-separated")
    parser.add_argument(
        "--calibration", type=cli.optional_path, help="calibration of the criterion, if it has one"
    )
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: model loading, bootstrap"
    )
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()

    criterion = create(arguments.criterion)
    levels = arguments.levels.split(",")
    for level in levels:
        check_level(criterion, level)
    manifest, checkpoint = from_manifest(arguments.model)
    import torch

    from sparsity_atlas.place import bind_all
    from sparsity_atlas.sites import bind_ffns

    settings = arguments.settings
    model = load(checkpoint, dtype=settings["dtype"], device=settings["device"])
    ids = ActivationStore(arguments.store).ids()
    first = settings.get("calibration_tokens", 0) // ids.shape[1]
    states = read_calibration(arguments.calibration).states if arguments.calibration else None
    ffns = bind_ffns(model, manifest["ffn"])
    with torch.no_grad():
        bound = bind_all(criterion, ffns, arguments.site, states)
        rows = list(
            measure(
                ffns,
                arguments.site,
                bound,
                levels,
                torch.from_numpy(ids[first:]).long(),
                settings["replicates"],
                settings["seed"],
            )
        )
    write_parquet(arguments.output, pa.Table.from_pylist(rows, SCHEMA))


if __name__ == "__main__":
    cli.run(main)
