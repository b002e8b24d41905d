"""How a sparsity changes with model size: the slope over log10 of the non-embedding parameters.

Of a mixture of experts those count that a token meets.

A line joins models of one family (architecture and activation) only. Its slope is the ordinary
least-squares one. Its 95 % interval is the wider of two: the points' own intervals propagated
through the fit, and Student's t on the scatter about the line. The second alone would trust three
points that happen to lie on a line, the first alone would call any two models a trend. Its ends are
rounded outwards to two digits of its half-width, which comes from ends of no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from sparsity_atlas.statistics.bootstrap import rounded_outwards

# Below three points the scatter about a line is unknown.
FEWEST_MODELS = 3

FAMILY = ["criterion", "family", "site", "task", "bar", "bar_label"]
SCALING = [*FAMILY, "models", "slope", "intercept", "low", "high", "resolved", "reason"]


@dataclass(frozen=True, slots=True)
class SizePoint:
    """One model's critical or PPL-p% sparsity.

    parameters: non-embedding ones; of a mixture of experts the active ones; or what else models grow in.
    value: sparsity, 0 to 1; None without a value, or where it lies beyond what was measured.
    low, high: 95 % interval; None without one; infinite where an end is open.
    """

    parameters: float
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Slope:
    """Slope of sparsity per tenfold of parameters; `reason` says why it is not resolved.

    slope, intercept (at one parameter), low, high: None where there is nothing to fit.
    """

    models: int
    slope: float | None
    intercept: float | None
    low: float | None
    high: float | None
    reason: str

    @property
    def resolved(self) -> bool:
        """Whether the slope's interval lies on one side of zero."""
        return not self.reason


def fit_slope(points: Sequence[SizePoint]) -> Slope:
    """Fit the points of one family at one site."""
    count = len(points)
    if any(point.value is None for point in points):
        return _nothing(count, "a value is missing or lies beyond the measured sparsities")
    x = np.log10([point.parameters for point in points])
    y = np.array([point.value for point in points], dtype=float)
    spread = float(((x - x.mean()) ** 2).sum())
    if spread < 1e-12:
        return _nothing(count, "all models have one size")
    weight = (x - x.mean()) / spread
    slope = float(weight @ y)
    intercept = float(y.mean() - slope * x.mean())
    if count < FEWEST_MODELS:
        return Slope(count, slope, intercept, None, None, f"{count} models")
    half = max(_propagated(points, weight), _scatter(y - intercept - slope * x, spread))
    if not np.isfinite(half):
        return Slope(count, slope, intercept, None, None, "an interval is open")
    low, high = rounded_outwards(slope - half, slope + half, half / 10)
    reason = "its interval spans zero" if low <= 0 <= high else ""
    return Slope(count, slope, intercept, low, high, reason)


def _nothing(count: int, reason: str) -> Slope:
    return Slope(count, None, None, None, None, reason)


def _propagated(points: Sequence[SizePoint], weight: np.ndarray) -> float:
    """Half-width that the points' intervals give; points without one add nothing."""
    halves = [
        0.0
        if point.value is None or point.low is None or point.high is None
        else max(point.value - point.low, point.high - point.value)
        for point in points
    ]
    # Open ends weigh in even where the point sits at the mean, where 0 x inf would be NaN.
    if not np.isfinite(halves).all():
        return float("inf")
    return float(np.sqrt(((weight * halves) ** 2).sum()))


def _scatter(residual: np.ndarray, spread: float) -> float:
    """Half-width from the scatter about the line, with n - 2 degrees of freedom."""
    freedom = len(residual) - 2
    error = np.sqrt((residual**2).sum() / freedom / spread)
    return float(stdtrit(freedom, 0.975) * error)


class Scaling:
    """The points of every family, taken row by row from critical_sparsity.csv."""

    def __init__(self, families: dict[str, str]) -> None:
        """Begin without points; `families` are by model."""
        self._families = families
        self._groups: dict[tuple[Any, ...], list[SizePoint]] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Take one row of critical_sparsity.csv."""
        named = {**row, "family": self._families[row["model"]]}
        key = tuple(named[name] for name in FAMILY)
        self._groups.setdefault(key, []).append(_size_point(row))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of scaling.csv: every group of two or more models of one family."""
        for key, points in self._groups.items():
            if len(points) > 1:
                slope = fit_slope(points)
                yield {
                    **dict(zip(FAMILY, key, strict=True)),
                    **asdict(slope),
                    "resolved": slope.resolved,
                }


def _size_point(row: dict[str, Any]) -> SizePoint:
    return SizePoint(
        parameters=row.get("active_non_embedding_parameters", row["non_embedding_parameters"]),
        value=row["value"] if row["relation"] == "=" else None,
        low=-np.inf if row["low_open"] else row["interval_low"],
        high=np.inf if row["high_open"] else row["interval_high"],
    )
