"""Stage `sensitivity`: what each layer costs by itself, one tensor of one layer at a time.

The captured tokens run through the model, but for those that calibrations looked at (of all criteria, so
that they compare); the loss of the next token, less the dense model's on the same sequences. A journal
beside the output holds every pass that is finished.
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
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.code_version import code_version
from sparsity_atlas.criteria import check_level, create, source_file
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.files.journal import Journal
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.files.whole import digest, file_digest
from sparsity_atlas.loading.devices import how
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.progress import Progress
from sparsity_atlas.statistics.bootstrap import TaskSamples, estimate, interval
from sparsity_atlas.terms import NAMED_PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.sites.find import Part
    from sparsity_atlas.studies.single_layer import Pass
    from sparsity_atlas.terms import PlaceKey

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
# Of a mixture further the part, of which a layer may have several with such a tensor.
SCHEMA_OF_PARTS = pa.schema([*SCHEMA, ("part", pa.string())])
SCHEMAS = (SCHEMA, SCHEMA_OF_PARTS)


def numbers(
    passes: Sequence[Pass | None],
    dense: Pass | None,
    positions: int,
    width: int,
    replicates: int,
    seed: int,
) -> Iterator[dict[str, float | None]]:
    """Sparsity and added loss of one place at each level, as `SCHEMA` has them.

    Args:
        passes: of each level; None where NaN or an infinity came up.
        dense: of the dense model.
        positions: tokens of a sequence, of which the first is not predicted.
        width: entries of the place's vector.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    whole = [one for one in passes if one is not None]
    found: Iterator[tuple[float, ...]] = iter(())
    if whole and dense is not None:
        nats, zeros = (np.array(column) for column in zip(*whole, strict=True))
        weight = np.full(nats.shape[1], positions - 1)
        entries = np.full(nats.shape, positions * width)
        samples = TaskSamples("sensitivity", "loss", nats, weight, dense.nats, zeros, entries)
        estimates = estimate(samples, replicates, seed)
        added = estimates.relative()
        ends = [interval(own[0], own[1:]) if len(own) > 1 else (np.nan, np.nan) for own in added.T]
        found = (
            (sparsity, value, *two)
            for sparsity, value, two in zip(estimates.sparsity[0], added[0], ends, strict=True)
        )
    for one in passes:
        known = dense is not None and one is not None
        values = next(found) if known else (np.nan,) * 4
        yield {
            name: float(value) if np.isfinite(value) else None
            for name, value in zip(SCHEMA.names[3:], values, strict=True)
        }


def passes(
    parts: Sequence[Part],
    site: str,
    bound: Mapping[PlaceKey, Criterion],
    levels: Sequence[str],
    ids: Tensor,
    batch: int,
    journal: Journal,
) -> list[Pass | None]:
    """The dense pass, then each place at each level, going on from what a journal holds.

    Args:
        parts: all of one model.
        site: where.
        bound: the criterion at every place.
        levels: of the criterion, as spelled in paths.
        ids: int64 [sequences, positions].
        batch: sequences a forward pass.
        journal: takes every finished pass.

    Returns:
        [1 + places × levels]; None where NaN or an infinity came up.
    """
    from sparsity_atlas.studies.single_layer import model_of, run, run_alone

    tries = [None, *((place, level) for place in bound for level in levels)]
    progress = Progress("made", len(tries), "passes")
    for one in tries[len(journal.records) :]:
        try:
            if one is None:
                made = run(model_of(parts), ids, batch)
            else:
                place, level = one
                made = run_alone(parts, site, place, bound[place], float(level), ids, batch)
        except NumericalFailure:
            journal.append(None)
        else:
            journal.append({"nats": made.nats.tolist(), "zeros": made.zeros.tolist()})
        progress.reach(len(journal.records))
    return [_pass(record) for record in journal.records]


def _pass(record: dict[str, list[Any]] | None) -> Pass | None:
    from sparsity_atlas.studies.single_layer import Pass

    if record is None:
        return None
    return Pass(np.array(record["nats"]), np.array(record["zeros"], dtype=np.int64))


def rows(
    parts: Sequence[Part],
    site: str,
    levels: Sequence[str],
    made: list[Pass | None],
    positions: int,
    replicates: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of `SCHEMA`, from what `passes` returned.

    Args:
        parts: all of one model.
        site: where.
        levels: of the criterion, as spelled in paths.
        made: the passes.
        positions: tokens of a sequence.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    from sparsity_atlas.criteria.place import places

    dense, *rest = made
    for number, place in enumerate(places(parts, site)):
        own = rest[number * len(levels) : (number + 1) * len(levels)]
        width = place.part.size(place.tensor)
        found = numbers(own, dense, positions, width, replicates, seed)
        for level, row in zip(levels, found, strict=True):
            where = {"tensor": place.tensor, "layer": place.layer, "part": place.part.name}
            yield {"level": level, **where, **row}


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas sensitivity", description=__doc__)
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
    parser.add_argument("--code", help="code version, part of the fingerprint; unset: of this code")
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()

    spec, settings, site = arguments.criterion, arguments.settings, arguments.site
    criterion = create(spec)
    levels = [level for level in arguments.levels.split(",") if level]
    if not levels:
        raise AtlasError(
            "run: sensitivity: no block names levels for this model, criterion and site"
        )
    for level in levels:
        check_level(criterion, level)
    manifest, checkpoint = from_manifest(arguments.model)
    import torch

    from sparsity_atlas.criteria.binding import bind_all
    from sparsity_atlas.sites.available import Available
    from sparsity_atlas.sites.find import bind_parts
    from sparsity_atlas.sites.part import chosen

    Available.in_manifest(manifest).check(manifest["name"], site)
    ids = ActivationStore(arguments.store).ids()
    ids = ids[settings["calibration_tokens"] // ids.shape[1] :]
    calibration = arguments.calibration
    model = load(checkpoint, **how(settings))
    parts, plain_site = chosen(bind_parts(model, manifest["ffn"]), site)
    fingerprint = {
        **{"model": manifest["digest"], "criterion": spec, "site": site, "levels": levels},
        **{"ids": digest(ids.tolist()), "batch_size": settings["batch_size"]},
        **{"device": str(model.device), "dtype": str(model.dtype)},
        "calibration": file_digest(calibration) if calibration else None,
        "code": arguments.code or code_version("sensitivity", str(source_file(spec))),
    }
    journal = Journal(arguments.output.with_suffix(".journal"), fingerprint)
    try:
        states = read_calibration(calibration).states if calibration else None
        with torch.no_grad():
            bound = bind_all(criterion, parts, plain_site, states)
        tensor = torch.from_numpy(ids).long()
        made = passes(parts, plain_site, bound, levels, tensor, settings["batch_size"], journal)
    finally:
        journal.close()
    bootstrap = settings["replicates"], settings["seed"]
    found = rows(parts, plain_site, levels, made, ids.shape[1], *bootstrap)
    named = any(part.name in NAMED_PARTS for part in parts)
    schema = SCHEMA_OF_PARTS if named else SCHEMA
    write_parquet(arguments.output, pa.Table.from_pylist(list(found), schema))
    journal.delete()
