"""Rows of allocation.csv: what criteria that give each layer a sparsity of its own found in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.criteria.calibration_file import read_calibration

_KEY = ("model", "criterion", "site")
ALLOCATION = [*_KEY, "allocation", "tensor", "layer", "sparsity", "damage", "own_sparsity"]


def allocation_rows(curves: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of allocation.csv, from the calibrations beside the curves."""
    for path in curves:
        calibration = path.with_name("calibration.safetensors")
        if not calibration.is_file():
            continue
        found = read_calibration(calibration, "np")
        for place, state in found.states.items():
            if "share" not in state:
                continue
            tensor, _, layer = place.rpartition(".")
            targets = np.linspace(0, 1, len(state["share"]))
            own = np.atleast_1d(np.interp(state["grid"], targets, state["share"]))
            for level, damage, share in zip(state["grid"], state["damage"], own, strict=True):
                yield {
                    **dict(zip(_KEY, path.parts[-4:-1], strict=True)),
                    "allocation": found.about["criterion"]["allocation"],
                    **{"tensor": tensor, "layer": int(layer), "sparsity": round(float(level), 6)},
                    **{"damage": float(damage), "own_sparsity": round(float(share), 6)},
                }
