"""Levels that the calibrations of an earlier run did not reach, before anything is evaluated at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.criteria import Criterion, create, declared
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.criteria.reach import misses
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.plan.jobs import searched_levels
from sparsity_atlas.plan.model_facts import Unknowns


def missed_targets(config: Config, results: Path, unknowns: Unknowns) -> Iterator[str]:
    """A line for each curve and level of which some places miss the target.

    Args:
        config: the configuration.
        results: folder of the results.
        unknowns: takes calibrations that cannot be read.
    """
    for curve in grid.curves(config):
        path = results / curve.folder / "calibration.safetensors"
        spec = json.loads(grid.criterion_slice(config, curve.criterion))
        if not path.is_file() or not declared(spec)["calibrated"]:
            continue
        try:
            rule, states = create(spec), read_calibration(path).states
        except AtlasError as error:
            unknowns.note(f"targets of {curve.folder}", error)
            continue
        levels: dict[str, list[str]] = {}
        for level, place, one in misses(rule, states, _levels(curve, rule, path.parent)):
            what = f"{one.reached:.1%} of {one.target:.1%}"
            if one.of == "cett":
                what = f"CETT {one.reached:.3g} of {one.target:.3g}"
            levels.setdefault(level, []).append(f"{place} {what}")
        for level, found in levels.items():
            yield f"{curve.folder}/{level}: {', '.join(found)}"


def _levels(curve: grid.Curve, rule: Criterion, folder: Path) -> list[str]:
    """Listed ones, and of a search those that it chose, or will begin with; as `levels_of` sorts them."""
    levels = {*curve.levels, *curve.sensitivity}
    if curve.auto:
        levels |= set(searched_levels(folder) or rule.coarse_levels)
    return sorted(levels, key=float, reverse=True)
