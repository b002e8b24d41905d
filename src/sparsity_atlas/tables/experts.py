"""Load and induced sparsity of each expert, from what the nodes counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.expert_table import NAME, read_table
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.terms import AVERAGE, TENSORS, plain
from sparsity_atlas.terms import EXPERTS as PART

if TYPE_CHECKING:
    import pandas as pd

EXPERTS = ["model", "criterion", "site", "level", "task", "phase", "layer", "tensor", "expert"]
EXPERTS += ["tokens", "load", "sparsity"]
_PLACE = ["layer", "tensor", "expert"]


def mixtures(models: Sequence[Path]) -> set[str]:
    """Names of the models that have routed experts, of some manifests."""
    return {
        path.parent.name
        for path in models
        if any(part.get("part") == PART for part in read_manifest(path)["ffn"])
    }


def expert_rows(curves: Sequence[Path], models: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of experts.csv: the dense baseline and every level of each curve of a mixture of experts.

    load: share of the tokens that were routed to the expert, so that those of a layer add up to the number
    of experts that a token meets. The task `average`, without a phase, is the mean over the tasks, as in
    layers.csv, of what a task's phases are together; of the sparsity, over those in which the expert had
    tokens.

    Args:
        curves: curve.json files, with their nodes' folders beside each.
        models: manifests of their models.

    Raises:
        AtlasError: a node has not the table that it tells of.
    """
    found = mixtures(models)
    for path in curves:
        model, criterion, site = path.parts[-4:-1]
        if model not in found:
            continue
        curve = read_manifest(path)
        dense = path.parents[2] / "dense"
        folders = {"dense": dense, **{level: path.parent / level for level in curve["levels"]}}
        for level, folder in folders.items():
            key = {"model": model, "criterion": criterion, "site": site, "level": level}
            for row in _node_rows(folder, site, list(curve["scores"][level])):
                yield {**key, **row}


def _node_rows(folder: Path, site: str, tasks: list[str]) -> Iterator[dict[str, Any]]:
    manifest = read_manifest(folder / "eval.json")
    tensors = [name for name in manifest.get("by_expert", ()) if name in TENSORS[plain(site)]]
    if not tensors:
        return
    import pandas as pd  # which a model's summary does not need; here and below

    table = read_table(folder / NAME)
    for task in tasks:
        if table.tasks.get(task) != manifest["fingerprints"][task]:
            raise AtlasError(
                f"{folder / NAME}: has not the '{task}' that eval.json tells of; delete both and run again"
            )
    each = pd.Series({(layer, tensor): each for layer, _, tensor, _, each in table.slots})
    rows = pd.concat([table.rows[task].to_pandas() for task in tasks])
    rows = rows[rows["tensor"].isin(tensors)]
    yield from _records(_shares(rows, ["task", "phase"], each))
    together = _shares(
        rows.groupby(["task", *_PLACE], sort=False)[["tokens", "entries", "zeros"]]
        .sum()
        .reset_index(),
        ["task"],
        each,
    )
    mean = together.groupby(_PLACE, sort=False).agg(
        {"tokens": "sum", "load": "mean", "sparsity": "mean"}
    )
    yield from _records(mean.reset_index().assign(task=AVERAGE, phase=""))


def _shares(rows: pd.DataFrame, by: list[str], each: pd.Series) -> pd.DataFrame:
    """Counts with an expert's load among those of its layer, and its sparsity."""
    import pandas as pd

    routed = rows.groupby([*by, "layer", "tensor"])["tokens"].transform("sum")
    met = each.reindex(pd.MultiIndex.from_frame(rows[["layer", "tensor"]])).to_numpy()
    # Of no tokens at all there are no shares.
    return rows.assign(
        load=rows["tokens"] * met / routed.where(routed > 0),
        sparsity=rows["zeros"] / rows["entries"].where(rows["entries"] > 0),
    )


def _records(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    columns = ["task", "phase", *_PLACE, "tokens", "load", "sparsity"]
    for row in rows[columns].itertuples(index=False, name=None):
        found = dict(zip(columns, row, strict=True))
        for name in ("load", "sparsity"):
            found[name] = None if np.isnan(found[name]) else found[name]
        yield found
