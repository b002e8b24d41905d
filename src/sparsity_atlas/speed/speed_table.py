"""The table of measured times, of one curve and of a run; light, since the tables' stage reads it.

Times are results of the machine that a row names: nothing is continued from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsity_atlas.files.parquet import read_parquet

TOKEN = "token"
FIXED, FOUND = "fixed", "found"
OK, REFUSED = "ok", "refused"
NO_EXPERTS = "routed experts have no sparse products"
SCHEMA = pa.schema(
    [
        ("timed", pa.string()),  # `token`: the whole model; else maps of a part
        ("context", pa.int64()),  # tokens before it, of whole tokens
        ("tokens", pa.int64()),  # decoded together
        ("threshold", pa.string()),
        ("of", pa.string()),  # the curve's own point: task and bar; empty: a share as wanted
        ("wanted", pa.float64()),  # sparsity
        ("level", pa.float64()),
        ("sparsity", pa.float64()),  # of the text that was run at that level
        ("unread_share", pa.float64()),
        ("bytes_read", pa.int64()),
        ("dense_us", pa.float64()),
        ("dense_spread_us", pa.float64()),
        ("dense_by", pa.string()),
        ("sparse_us", pa.float64()),
        ("sparse_spread_us", pa.float64()),
        ("speedup", pa.float64()),
        ("ideal_speedup", pa.float64()),
        ("realised_share", pa.float64()),
        ("pays_from", pa.float64()),
        ("copies_bytes", pa.int64()),
        ("shape", pa.string()),
        ("layers", pa.int64()),
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("driver", pa.string()),
        ("versions", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
SPEED = ["model", "criterion", "site", *SCHEMA.names]


def speed_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Rows of speed.csv, from some results/{model}/{criterion}/{site}/speed.parquet."""
    for path in paths:
        key = dict(zip(("model", "criterion", "site"), path.parts[-4:-1], strict=True))
        for row in read_parquet(path, SCHEMA).to_pylist():
            yield {**key, **row}
