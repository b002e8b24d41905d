"""speed.parquet as the stage leaves it, of times that are made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.speed.speed_table import FIXED, FOUND, OK, REFUSED, SCHEMA, TOKEN

MACHINE = {"device": "Some GPU", "driver": "1.0", "versions": "torch 2", "dtype": "bfloat16"}
# Of 100 microseconds what finding a threshold takes.
FINDING = 10.0


def speed_row(
    timed: str,
    tokens: int,
    threshold: str,
    sparsity: float,
    of: str = "",
    *,
    share: float = 0.5,
    spread: float = 1.0,
    **other: Any,
) -> dict[str, Any]:
    """A dense time of 100; what is not read of `share` of the weights saves all of its own time."""
    unread = share * sparsity**tokens
    sparse = 100 * (1 - unread) + (FINDING if threshold == FOUND else 0.0)
    return {
        **MACHINE,
        **{"timed": timed, "context": 512 if timed == TOKEN else None, "tokens": tokens},
        **{"threshold": threshold, "of": of, "wanted": sparsity, "level": 0.9},
        **{"sparsity": sparsity, "unread_share": unread, "bytes_read": round(1e6 * (1 - unread))},
        **{"dense_us": 100.0, "dense_spread_us": spread, "dense_by": "library"},
        **{"sparse_us": sparse, "sparse_spread_us": spread, "speedup": 100 / sparse},
        **{"ideal_speedup": 1 / (1 - unread), "pays_from": 0.2 if threshold == FOUND else 0.0},
        "realised_share": (1 - sparse / 100) / unread if unread > 0.02 else None,
        **{"copies_bytes": 2**20, "shape": "4 to 8", "layers": 2, "status": OK, "reason": ""},
        **other,
    }


def speed_table(
    own: dict[str, float],
    timed: Sequence[str] = ("ffn", TOKEN),
    tokens: Sequence[int] = (1, 2, 4),
) -> Iterator[dict[str, Any]]:
    """Rows of one curve, with its own points; one map is refused."""
    for what in timed:
        for count in tokens:
            for threshold in (FOUND, FIXED):
                for step in range(10):
                    yield speed_row(what, count, threshold, step / 10)
                for of, sparsity in own.items():
                    yield speed_row(what, count, threshold, sparsity, of)
    yield {**MACHINE, "timed": "experts", "status": REFUSED, "reason": "none of ours"}


def write_speed(folder: Path, **curve: Any) -> None:
    """results/M/C/S/speed.parquet."""
    rows = list(speed_table({"prose PPL-1%": 0.4}, **curve))
    write_parquet(folder / "speed.parquet", pa.Table.from_pylist(rows, SCHEMA))
