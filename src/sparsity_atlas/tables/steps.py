"""Masks over the steps of masked-diffusion models' generations, from what the nodes counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.step_table import NAME, read_table
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.sparsify.step_sums import BINS, UNIT
from sparsity_atlas.terms import DIFFUSION

if TYPE_CHECKING:
    import pandas as pd

_PLACE = ["step", "layer", "part", "tensor", "region"]
_SHARES = ["sparsity", "previous_overlap", "previous_token_overlap", "first_overlap"]
_SHARES += [
    "first_token_overlap",
    "unused",
    "always",
    "previous_used_overlap",
    "first_used_overlap",
]
STEPS = ["model", "criterion", "site", "level", "task", *_PLACE, "tokens", *_SHARES]
# Steps of a task that are shown, evenly spread: there may be a thousand, which steps.parquet has all.
MOST = 64


def step_rows(curves: Sequence[Path], models: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of steps.csv: every level of each curve of a masked-diffusion model.

    Overlaps are Jaccard indices, of masks with those of the step before and of step 0: over all tokens of a
    region together, and as a mean over its tokens. Of masks that keep nothing the index is 1. Of prompt
    and answer there are also shares of neurons: unused by all tokens of a generation's prompt or answer,
    kept by all of them, and the overlap of those that are used at all.

    Args:
        curves: curve.json files, with their nodes' folders beside each.
        models: manifests of their models.

    Raises:
        AtlasError: a node has not the table that it tells of.
    """
    found = {path.parent.name for path in models if read_manifest(path)["kind"] == DIFFUSION}
    for path in curves:
        model, criterion, site = path.parts[-4:-1]
        if model not in found:
            continue
        curve = read_manifest(path)
        for level in curve["levels"]:
            key = {"model": model, "criterion": criterion, "site": site, "level": level}
            for row in _node_rows(path.parent / level, list(curve["scores"][level])):
                yield {**key, **row}


def _node_rows(folder: Path, tasks: list[str]) -> Iterator[dict[str, Any]]:
    manifest = read_manifest(folder / "eval.json")
    if "by_step" not in manifest:
        return
    table = read_table(folder / NAME)
    for task in tasks:
        if table.tasks.get(task) != manifest["fingerprints"][task]:
            raise AtlasError(
                f"{folder / NAME}: has not the '{task}' that eval.json tells of; delete both and run again"
            )
        rows = table.rows[task].to_pandas()
        rows = _with_shares(rows[rows["step"].isna() | rows["step"].isin(_shown(rows))])
        for row in rows[[*_PLACE, "tokens", *_SHARES]].itertuples(index=False, name=None):
            values = dict(zip([*_PLACE, "tokens", *_SHARES], row, strict=True))
            values["step"] = None if np.isnan(values["step"]) else int(values["step"])
            for name in _SHARES:
                values[name] = None if np.isnan(values[name]) else values[name]
            yield {"task": task, **values}


def _shown(rows: pd.DataFrame) -> np.ndarray:
    """The steps that are shown."""
    steps: np.ndarray = np.unique(rows["step"].dropna())
    places = np.linspace(0, len(steps) - 1, min(MOST, len(steps)))
    shown: np.ndarray = steps[places.round().astype(int)]
    return shown


def _with_shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Counts with what they are of what there is; NaN of nothing, and where there is no other step."""
    tokens = rows["tokens"].where(rows["tokens"] > 0)
    neurons = rows["neurons"].where(rows["neurons"] > 0)
    shares = {
        "sparsity": 1 - rows["kept"] / rows["entries"].where(rows["entries"] > 0),
        "unused": rows["frequency_0"] / neurons,
        "always": rows[f"frequency_{BINS - 1}"] / neurons,
    }
    for other in ("previous", "first"):
        shares[f"{other}_token_overlap"] = rows[f"{other}_jaccard"] / UNIT / tokens
        for name, own, there, both, of in (
            ("overlap", "kept", f"{other}_kept", f"{other}_both", tokens),
            ("used_overlap", "used", f"{other}_used", f"{other}_used_both", neurons),
        ):
            either = rows[own] + rows[there] - rows[both]
            index = (rows[both] / either.where(either > 0)).where(either != 0, 1.0)
            shares[f"{other}_{name}"] = index.where(of.notna() & rows[there].notna())
    return rows.assign(**shares)
