"""Stage `export`: the thresholds of a calibrated criterion at each of its levels, for kernels.

{level}/thresholds.safetensors   tensors {tensor}.{layer}.{name}; `threshold`, [] or [width], is what |v|
                                 must reach for an entry to be kept; of experts that differ
                                 {tensor}.{layer}.experts.e{expert}.{name}
{level}/thresholds.json          what they belong to: model, criterion, site, level, calibration, and for
                                 each tensor and layer the modules that read it
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.criteria.level_arguments import add_levels, levels_of
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import (
    canonical,
    file_digest,
    write_atomically,
    write_manifest,
)
from sparsity_atlas.loading.devices import how
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.sites.available import Available
from sparsity_atlas.sites.part import chosen


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas export", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    parser.add_argument("--site", required=True)
    parser.add_argument("--calibration", required=True, type=Path)
    add_levels(parser)
    parser.add_argument("--settings", required=True, type=json.loads, help="JSON: model loading")
    parser.add_argument("--output", required=True, type=Path, help="manifest to write, last")
    arguments = parser.parse_args()

    criterion = create(arguments.criterion)
    levels = levels_of(arguments)
    for level in levels:
        check_level(criterion, level)
    manifest, checkpoint = from_manifest(arguments.model)
    Available.in_manifest(manifest).check(manifest["name"], arguments.site)
    calibration = read_calibration(arguments.calibration)

    from safetensors.torch import save_file

    from sparsity_atlas.criteria.binding import bind_all
    from sparsity_atlas.criteria.expert_rules import each
    from sparsity_atlas.criteria.place import places, state_name
    from sparsity_atlas.sites.find import bind_parts

    settings = arguments.settings
    model = load(checkpoint, **how(settings))
    parts, site = chosen(bind_parts(model, manifest["ffn"]), arguments.site)
    bound = bind_all(criterion, parts, site, calibration.states)
    about: dict[str, Any] = {
        "model": {key: manifest[key] for key in ("name", "source", "revision", "digest")},
        "criterion": {key: value for key, value in arguments.criterion.items() if key != "file"},
        "site": arguments.site,
        "calibration": calibration.identity(),
        "readers": {
            state_name(place.key): [reader.path for reader in place.readers()]
            for place in places(parts, site)
        },
    }
    written = {}
    for level in levels:
        tensors = {
            f"{state_name(key, expert)}.{name}": value.cpu().clone()  # experts may have one state together
            for key, rule in bound.items()
            for expert, own in each(rule)
            for name, value in own.export(float(level)).items()
        }
        if not tensors:
            raise AtlasError(f"criteria: {type(criterion).__name__} has no thresholds to export")
        path = cli.folder_of(arguments.output) / level / "thresholds.safetensors"
        metadata = {"about": canonical({**about, "level": level})}
        write_atomically(path, partial(save_file, tensors, metadata=metadata))
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        write_manifest(path.with_suffix(".json"), {**about, "level": level, "tensors": shapes})
        written[level] = {"file": f"{level}/{path.name}", "sha256": file_digest(path)}
    write_manifest(arguments.output, {**about, "levels": written})
    cli.logger.info("exported %d levels", len(written))
