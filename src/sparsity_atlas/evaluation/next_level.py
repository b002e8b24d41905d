"""Which level a search tries next: a pure function of what it has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from scipy.interpolate import PchipInterpolator

from sparsity_atlas.spelling import canonical_level

# No criterion at hand tells levels apart that are closer than this.
SMALLEST_STEP = Decimal("0.00001")


@dataclass(frozen=True)
class Point:
    """What a level did.

    Attributes:
        level: as spelled in paths.
        sparsity: induced, 0 to 1; NaN if the level failed numerically.
        damage: share of the damage that the bar allows: 0 as good as dense, 1 at the bar, more
            below it; infinity if the level failed.
    """

    level: str
    sparsity: float
    damage: float


@dataclass(frozen=True)
class Stop:
    """No further level, and why."""

    reason: str


@dataclass(frozen=True)
class Range:
    """The levels a search may use: `dense` changes nothing, `harshest` is the other end."""

    dense: float
    harshest: float
    coarse: tuple[str, ...]


def next_level(
    points: Sequence[Point],
    dense_sparsity: float,
    levels: Range,
    max_levels: int,
    resolution: float,
) -> str | Stop:
    """Choose the next level, or stop.

    First the coarse levels, for the shape of the curve. Then the bracket (the mildest level below
    the bar and the next milder one, or dense) is narrowed until its ends lie within `resolution`:
    by levels on either side of where the damage is expected to reach the bar, which takes two or
    three levels where halving takes five.

    Args:
        points: levels evaluated so far, in any order.
        dense_sparsity: share of exact zeros in the dense model.
        levels: range and coarse levels of the criterion.
        max_levels: most levels to evaluate.
        resolution: in induced sparsity; 0.01 is one point.
    """
    tried = {point.level for point in points}
    full = Stop(f"{max_levels} levels evaluated")
    for level in levels.coarse:
        if level not in tried:
            return full if len(points) >= max_levels else level

    known = [Point(canonical_level(levels.dense), dense_sparsity, 0.0), *_placed(points)]
    known.sort(key=lambda point: abs(float(point.level) - levels.dense))
    below = next((i for i, point in enumerate(known) if point.damage > 1), None)
    if below is None:
        if 1 - known[-1].sparsity <= resolution:
            return Stop("above the bar at full sparsity")
        known.append(Point(canonical_level(levels.harshest), 1.0, math.inf))
        below = len(known) - 1
    mild, harsh = known[max(below - 1, 0)], known[below]
    if harsh.level in tried and harsh.sparsity - mild.sparsity <= resolution:
        return Stop(f"bracketed within {100 * resolution:g} points of induced sparsity")
    if len(points) >= max_levels:
        return full
    target = _target(mild, harsh, known[below + 1 :], resolution)
    # Without the levels that a noisy score put out of order, sparsity gives the level.
    level = _short(
        mild, harsh, _level_at(known, target) if mild.sparsity < harsh.sparsity else None
    )
    if level is None or level in tried:
        return Stop("no level between the ends of the bracket")
    return level


def _placed(points: Sequence[Point]) -> list[Point]:
    """A failed level is as harsh as full sparsity."""
    return [
        Point(point.level, 1.0 if math.isnan(point.sparsity) else point.sparsity, point.damage)
        for point in points
    ]


def _target(mild: Point, harsh: Point, beyond: Sequence[Point], resolution: float) -> float:
    """Sparsity to try: just beyond the expected crossing, on the side of the farther end."""
    width = harsh.sparsity - mild.sparsity
    if not math.isfinite(harsh.damage):
        return mild.sparsity + width / 2
    if mild.damage > 0:
        # Damage grows like a power of sparsity: straight on a logarithmic scale.
        share = math.log(mild.damage) / (math.log(mild.damage) - math.log(harsh.damage))
    else:
        share = harsh.damage ** (-1 / _power(mild, harsh, beyond))
    crossing = mild.sparsity + share * width
    offset = 0.4 * resolution
    crossing += offset if share < 0.5 else -offset
    # Never so near an end that a bad guess gains nothing.
    margin = max(0.1 * width, min(offset, width / 2))
    return min(max(crossing, mild.sparsity + margin), harsh.sparsity - margin)


def _power(mild: Point, harsh: Point, beyond: Sequence[Point]) -> float:
    """Power of sparsity by which damage grows beyond `mild`; 2 where only one level tells."""
    for point in beyond:
        if harsh.damage < point.damage < math.inf and point.sparsity > harsh.sparsity:
            stretch = (point.sparsity - mild.sparsity) / (harsh.sparsity - mild.sparsity)
            # Between a straight line and a step: a noisy score may say anything.
            return min(max(math.log(point.damage / harsh.damage) / math.log(stretch), 1.0), 8.0)
    return 2.0


def _level_at(known: Sequence[Point], sparsity: float) -> float | None:
    """Level that gives a sparsity, by monotone interpolation through the levels so far.

    The distance from the dense level grows like a power of the sparsity added, so both are taken
    on logarithmic scales; towards dense, the power of the mildest two levels goes on. None where
    noise has put a level below the dense model's own sparsity.
    """
    dense = known[0]
    if sparsity <= dense.sparsity:
        return None
    xs: list[float] = []
    ys: list[float] = []
    for point in known[1:]:
        added = point.sparsity - dense.sparsity
        if added > 0 and (not xs or math.log(added) > xs[-1]):
            xs.append(math.log(added))
            ys.append(math.log(abs(float(point.level) - float(dense.level))))
    wanted = math.log(sparsity - dense.sparsity)
    if len(xs) > 1 and wanted >= xs[0]:
        distance = float(PchipInterpolator(xs, ys)(wanted))
    else:
        power = (ys[1] - ys[0]) / (xs[1] - xs[0]) if len(xs) > 1 else 1.0
        distance = ys[0] + power * (wanted - xs[0])
    return float(dense.level) + math.copysign(
        math.exp(min(distance, max(ys))), float(known[-1].level) - float(dense.level)
    )


def _short(mild: Point, harsh: Point, wanted: float | None) -> str | None:
    """The shortest sensible decimal near `wanted`, strictly between two levels."""
    low, high = sorted((Decimal(mild.level), Decimal(harsh.level)))
    gap = high - low
    if gap < 2 * SMALLEST_STEP:
        return None
    # Three digits of the gap place a level within a thousandth of it, and paths stay legible.
    step = max(SMALLEST_STEP, Decimal(1).scaleb(gap.adjusted() - 2))
    middle = Decimal(repr(wanted)) if wanted is not None else (low + high) / 2
    inside = min(max(middle.quantize(step), low.quantize(step) + step), high.quantize(step) - step)
    return canonical_level(inside) if low < inside < high else None
