"""Scores of a curve at fixed induced sparsities, so that criteria and models can be compared at equal ones.

Levels of two criteria hardly ever induce the same sparsity, so each curve is read between its levels:
on the monotone fit, by monotone cubic interpolation, in every bootstrap replicate. Added loss grows like
a power of sparsity, so it is interpolated on a scale that is logarithmic above the bar of PPL + 1 % and
linear below. With points 20 % of sparsity apart, values are off by some 5 %, of which no interval knows:
list the levels that are to be compared where that matters. Curves of one model
draw the same samples in the same replicate (`bootstrap.estimate`), so that their differences are paired.
The same holds of where they cross the bars, which stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy.interpolate import PchipInterpolator

from sparsity_atlas.curves.critical import crossings, usable
from sparsity_atlas.curves.points import anchored_scores
from sparsity_atlas.files.parquet import read_parquet, write_parquet
from sparsity_atlas.statistics.bootstrap import Estimates
from sparsity_atlas.statistics.monotone_cubic import monotone_cubic
from sparsity_atlas.terms import IN_NATS

# What sparsity is a share of: the entries of a site's vectors, or the parameters that they meet.
Of = Literal["entries", "parameters"]
# Induced sparsities at which curves are read.
SPARSITIES = tuple(round(0.05 * step, 2) for step in range(1, 20))
ALLOWED_LOSS = float(np.log(1.01))
# Replicates of a curve that are kept for differences, at most: each is a number for every sparsity.
REPLICATES = 2000
# Measured points farther apart than this say nothing of what lies between them.
WIDEST_GAP = 0.25
# A place as close to a measured point as this is that point's, whatever lies on its other side.
CLOSE = 0.01

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("kind", pa.string()),
        ("sparsity_of", pa.string()),
        ("sparsity", pa.float64()),  # null in rows of a bar
        ("bar", pa.float64()),  # null in rows at a sparsity
        # Added loss in nats per token, or retained accuracy; in rows of a bar the sparsity where it is
        # crossed, infinite where that lies beyond what was measured.
        ("value", pa.float64()),
        ("replicates", pa.list_(pa.float64())),  # the same, in each bootstrap replicate
    ]
)


_Scale = Callable[[np.ndarray], np.ndarray]
# The fit of a loss is the negative added loss.
_OF_NATS: tuple[_Scale, _Scale] = (
    lambda fit: np.arcsinh(-fit / ALLOWED_LOSS),
    lambda value: ALLOWED_LOSS * np.sinh(value),
)
_SCALES: dict[str, tuple[_Scale, _Scale]] = {
    "accuracy": (lambda fit: fit, lambda value: value),
    **dict.fromkeys(IN_NATS, _OF_NATS),
}


def read_between(x: np.ndarray, y: np.ndarray, at: Sequence[float]) -> np.ndarray:
    """Values of a monotone curve between its points.

    Args:
        x: [points], ascending; points at one place are one point.
        y: [points]; an infinite one ends the curve.
        at: places.

    Returns:
        [places]; NaN outside the curve, and in its gaps but for their very ends.
    """
    usable = np.isfinite(y) & np.isfinite(x)
    usable &= np.logical_and.accumulate(usable)
    x, first = np.unique(x[usable], return_index=True)
    y = y[usable][first]
    places = np.asarray(at, dtype=np.float64)
    if len(x) < 2:
        return np.where(np.isin(places, x), y[0] if len(y) else np.nan, np.nan)
    found = PchipInterpolator(x, y, extrapolate=False)(places)
    after = np.clip(np.searchsorted(x, places), 1, len(x) - 1)
    near = np.abs(places[:, None] - x).min(axis=1) <= CLOSE
    gap = (x[after] - x[after - 1] > WIDEST_GAP + 1e-9) & ~near
    return np.where(gap, np.nan, found)


def at_sparsities(estimates: Estimates, at: Sequence[float] = SPARSITIES) -> np.ndarray:
    """Added loss or retained accuracy at fixed sparsities: [1 + B, places], row 0 as measured.

    Columns outside the measured range or in a gap of it are NaN in every row. In a replicate the range
    differs a little; a place just beyond its end takes the end's value.
    """
    scores = anchored_scores(estimates)
    scale, unscale = _SCALES[estimates.kind]
    x, y = scores.x, scale(scores.fit)
    measured = read_between(x[0], y[0], at)
    found = np.full((len(x), len(measured)), np.nan)
    found[0] = measured
    inside = np.isfinite(measured)
    places = np.asarray(at, dtype=np.float64)[inside]
    # A failed level ends a fit, and points at one place are one point; what is left of each row comes first.
    kept = np.isfinite(y)
    kept[:, 1:] &= x[:, 1:] != x[:, :-1]
    first = np.argsort(~kept, axis=1, kind="stable")
    x, y = np.take_along_axis(x, first, axis=1), np.take_along_axis(y, first, axis=1)
    points = kept.sum(axis=1)
    for count in np.unique(points[1:]):
        rows = 1 + np.flatnonzero(points[1:] == count)
        own_x, own_y = x[rows, :count], y[rows, :count]
        # One point where a replicate's levels all tie with dense.
        values = np.broadcast_to(own_y[:, :1], (len(rows), len(places)))
        if count > 1:
            values = monotone_cubic(own_x, own_y, np.clip(places, own_x[:, :1], own_x[:, -1:]))
        found[np.ix_(rows, inside)] = values
    return unscale(found)


def equal_rows(every: Sequence[Estimates], of: Of = "entries") -> list[dict[str, Any]]:
    """Rows of `SCHEMA` for one curve: each of `estimate_all`.

    Args:
        every: their sparsities are shares of what `of` says.
        of: what sparsity is a share of.
    """
    rows = []
    for whole in every:
        estimates = whole.first(REPLICATES)
        dense = estimates.dense_value[0]
        if not np.isfinite(dense) or (estimates.kind == "accuracy" and dense == 0):
            continue
        values = at_sparsities(estimates)
        for place, sparsity in enumerate(SPARSITIES):
            if np.isfinite(values[0, place]):
                rows.append(
                    {
                        **{"task": estimates.task, "kind": estimates.kind},
                        **{"sparsity_of": of, "sparsity": sparsity, "bar": None},
                        "value": float(values[0, place]),
                        "replicates": values[1:, place].tolist(),
                    }
                )
    return rows


def crossing_rows(every: Sequence[Estimates], bars: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of `SCHEMA` for the bars of one curve: each of `estimate_all` that has a critical sparsity."""
    rows = []
    for whole in every:
        estimates = whole.first(REPLICATES)
        scores = usable(estimates)
        if scores is None:
            continue
        for bar in bars:
            found = crossings(estimates, scores, bar)
            rows.append(
                {
                    **{"task": estimates.task, "kind": estimates.kind},
                    **{"sparsity_of": "entries", "sparsity": None, "bar": bar},
                    **{"value": float(found[0]), "replicates": found[1:].tolist()},
                }
            )
    return rows


def write_equal(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a curve's rows."""
    write_parquet(path, pa.Table.from_pylist(rows, SCHEMA))


def read_equal(path: Path) -> list[dict[str, Any]]:
    """Read a curve's rows at fixed sparsities, replicates as arrays.

    Raises:
        AtlasError: the file is missing or damaged.
    """
    return [row for row in _read(path) if row["bar"] is None]


def read_crossings(path: Path) -> list[dict[str, Any]]:
    """Read a curve's rows of bars, as `read_equal` does the others."""
    return [row for row in _read(path) if row["bar"] is not None]


def _read(path: Path) -> list[dict[str, Any]]:
    rows = read_parquet(path, SCHEMA).to_pylist()
    return [{**row, "replicates": np.array(row["replicates"], dtype=float)} for row in rows]
