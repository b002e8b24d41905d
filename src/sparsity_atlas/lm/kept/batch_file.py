"""Batches as bytes, so that other processes need not arrange the same requests again."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from sparsity_atlas.lm.forest import Batch

# How many numbers a batch has of each field; the first is one number for each of its rows' places.
_SHAPES = {
    **dict.fromkeys(("tokens", "depth", "ends"), "places"),
    "lengths": "rows",
    **dict.fromkeys(("requests", "owners", "last", "known", "run", "counted"), "requests"),
    **dict.fromkeys(("brought", "firsts"), "requests"),
    "documents": "documents",
    "scored": "scored",
    **dict.fromkeys(("row", "targets"), "predictions"),
}
_COUNTS = ("rows", "longest", "branched", "requests", "documents", "scored", "predictions")
_ABOUT = b"about"
assert {one.name for one in fields(Batch)} == {*_SHAPES, "branched"}


def written(batches: dict[str, list[Batch]], about: dict[str, Any]) -> bytes:
    """Batches, and what else is to be kept with them.

    Args:
        batches: by kind of request.
        about: JSON-able.
    """
    every = [batch for some in batches.values() for batch in some]
    counts = np.array([_counts(batch) for batch in every], np.int64).reshape(-1, len(_COUNTS))
    arrays = {"counts": counts.ravel()}
    for name in _SHAPES:
        own = [np.ravel(getattr(batch, name)) for batch in every]
        # Places, tokens and numbers of requests: none comes near what 32 bits hold.
        arrays[name] = np.concatenate([np.zeros(0, np.int64), *own]).astype(np.int32)
    columns = {
        name: pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), pa.array(array))
        for name, array in arrays.items()
    }
    content = {"kinds": {kind: len(some) for kind, some in batches.items()}, **about}
    table = pa.record_batch(columns).replace_schema_metadata({_ABOUT: json.dumps(content)})
    buffer = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(buffer, table.schema, options=options) as stream:
        stream.write_batch(table)
    found: bytes = buffer.getvalue().to_pybytes()
    return found


def read(content: bytes) -> tuple[dict[str, list[Batch]], dict[str, Any]]:
    """What `written` was given."""
    with pa.ipc.open_stream(pa.BufferReader(content)) as stream:
        table = stream.read_next_batch()
    about = json.loads(table.schema.metadata[_ABOUT])
    arrays = {name: table[name].flatten().to_numpy() for name in table.schema.names}
    counts = arrays.pop("counts").reshape(-1, len(_COUNTS))
    of = dict(zip(_COUNTS, counts.T, strict=True))
    of["places"] = of["rows"] * of["longest"]
    parts = {
        name: np.split(array.astype(np.int64), of[_SHAPES[name]].cumsum()[:-1])
        for name, array in arrays.items()
    }
    every = iter(
        _batch({name: some[number] for name, some in parts.items()}, own)
        for number, own in enumerate(counts.tolist())
    )
    kinds: dict[str, int] = about.pop("kinds")
    return {kind: list(itertools.islice(every, count)) for kind, count in kinds.items()}, about


def _counts(batch: Batch) -> tuple[int, ...]:
    return (
        *batch.tokens.shape,
        batch.branched,
        *(len(one) for one in (batch.requests, batch.documents, batch.scored, batch.targets)),
    )


def _batch(arrays: dict[str, Any], counts: list[int]) -> Batch:
    rows, longest, branched, *_ = counts
    for name, shape in _SHAPES.items():
        if shape == "places":
            arrays[name] = arrays[name].reshape(rows, longest)
    lists = {name: arrays.pop(name).tolist() for name in ("requests", "documents")}
    return Batch(**arrays, **lists, branched=bool(branched))
