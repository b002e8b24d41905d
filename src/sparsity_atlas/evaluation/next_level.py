"""Which level a search tries next: a pure function of what it has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from scipy.interpolate import PchipInterpolator

from sparsity_atlas.spelling import canonical_level

# No criterion at hand tells levels apart that are closer than this.
SMALLEST_STEP = Decimal("0.00001")
# Damage of the level that is put before the crossing. Bootstrap replicates cross earlier than the
# measured curve, and where no level lies before them, their crossing is not known.
BEFORE = 0.5
# Share of the crossing's sparsity up to which a level lies before it, and where one is put that is missing.
EARLY, EARLIER = 0.85, 0.8
# Damage at the lowest default bar: of 95 % of dense accuracy 5, of the perplexity that stands for it 5.2.
LOWEST_BAR = 5.2
# A bracket as wide as so many resolutions moves neither the crossing nor its interval by much: what is
# lacking before and beyond it comes first.
NEARLY = 3
# Levels from which on none is spent on what lies beyond the headline bar, nor on a bracket that narrow.
ENOUGH_LEVELS = 6
# The interval of a crossing ends about so many standard errors of the damage away from it. Where that is
# further than so many resolutions from the bracket, and between levels that lie further apart than so many,
# the straight line of a fit crosses well before the curve does, and the end is not where it should be.
ERRORS, AWAY, APART = 2.0, 1.5, 6
# Damage, as a share of what a further bar allows, that the harshest level does, so that replicates of the
# bootstrap that cross late have a crossing.
BEYOND = 1.5


@dataclass(frozen=True)
class Point:
    """What a level did.

    Attributes:
        level: as spelled in paths.
        sparsity: induced, 0 to 1; NaN if the level failed numerically.
        damage: share of the damage that the bar allows: 0 as good as dense, 1 at the bar, more
            below it; infinity if the level failed.
        slightest: the same of the score that suffered least, where there are others than the headline's.
        error: standard error of the damage, from the samples; 0 if it is not known.
    """

    level: str
    sparsity: float
    damage: float
    slightest: float = math.inf
    error: float = 0.0


@dataclass(frozen=True)
class Stop:
    """No further level, and why: of the headline bar, then of each further one."""

    reason: str
    further: tuple[str, ...] = ()


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
    further: Sequence[tuple[float, int]] = (),
) -> str | Stop:
    """Choose the next level, or stop: the headline bar is bracketed first, then each further one.

    Args:
        points: levels evaluated so far, in any order.
        dense_sparsity: share of exact zeros in the dense model.
        levels: range and coarse levels of the criterion.
        max_levels: most levels to evaluate for the headline bar.
        resolution: in induced sparsity; 0.01 is one point.
        further: the damage that each further bar allows, in units of what the headline's does, and the
            most levels to evaluate until it is bracketed, those of the bars before it among them.
    """
    chosen = _for_bar(points, dense_sparsity, levels, max_levels, resolution)
    reasons = []
    for allowed, most in further:
        if not isinstance(chosen, Stop):
            return chosen
        reasons.append(chosen.reason)
        scaled = [
            replace(
                one,
                damage=one.damage / allowed,
                slightest=math.inf,
                error=one.error / allowed,
            )
            for one in points
        ]
        chosen = _for_bar(scaled, dense_sparsity, levels, most, resolution, BEYOND, most)
    if not isinstance(chosen, Stop):
        return chosen
    first, *others = [*reasons, chosen.reason]
    return Stop(first, tuple(others))


def _for_bar(
    points: Sequence[Point],
    dense_sparsity: float,
    levels: Range,
    max_levels: int,
    resolution: float,
    lowest: float = LOWEST_BAR,
    enough: int = ENOUGH_LEVELS,
) -> str | Stop:
    """Choose the next level around one bar, in whose units damage is, or stop.

    First one of the coarse levels, and from there harsher ones until one is below the bar. The next is
    put where half the allowed damage is expected. Then the bracket (the mildest level below the bar and
    the next milder one, or dense) is narrowed until its ends lie within `resolution`: by levels on
    either side of where the damage is expected to reach the bar, which takes two or three levels where
    halving takes five. Once they are near, those of `enough` that are left go to the ends of the crossing's
    interval (first where levels lie further apart), and to harsher coarse levels, until every score's
    damage is `lowest`, by default that of the lowest of the default bars; beyond them, near is enough.

    Args:
        points: as those of `next_level`.
        dense_sparsity: likewise.
        levels: likewise.
        max_levels: most levels to evaluate.
        resolution: in induced sparsity.
        lowest: damage that the harshest level should do.
        enough: levels from which on none is spent on that.
    """
    if not points:
        return levels.coarse[(len(levels.coarse) - 1) // 2]
    full = Stop(f"{max_levels} levels evaluated")
    tried = {point.level for point in points}
    known = [Point(canonical_level(levels.dense), dense_sparsity, 0.0), *_placed(points)]
    known.sort(key=lambda point: _distance(point.level, levels))
    below = next((i for i, point in enumerate(known) if point.damage > 1), None)
    if below is None:
        if 1 - known[-1].sparsity <= resolution:
            return Stop("above the bar at full sparsity")
        if len(points) >= max_levels:
            return full
        if harsher := _harsher(known[-1], levels):
            return harsher
        known.append(Point(canonical_level(levels.harshest), 1.0, math.inf))
        below = len(known) - 1
    mild, harsh = known[max(below - 1, 0)], known[below]
    early = _early(known, harsh, tried)
    width = harsh.sparsity - mild.sparsity if harsh.level in tried else math.inf
    before = early and _level_near(known, known[0], _first(known), early, levels)
    beyond = _wider(known[-1], levels, lowest) if len(points) < enough else None
    more = before or beyond
    if width <= NEARLY * resolution and len(points) < enough:
        late = known[-1].damage - ERRORS * known[-1].error <= 1  # and no level tells how late
        ends = [_end(known, below, side, resolution, levels) for side in (1, -1)]
        _, end = max(ends, key=lambda one: one[0])
        more = (beyond if late else None) or end or more
    if width <= NEARLY * resolution and len(points) < max_levels and more:
        return more
    near_enough = resolution if len(points) < enough else NEARLY * resolution
    if width <= near_enough:
        return Stop(f"bracketed within {100 * near_enough:g} points of induced sparsity")
    if len(points) >= max_levels:
        return full
    if before and len(points) == max_levels - 1:
        return before
    level = _level_near(known, mild, harsh, _target(known, below, resolution), levels)
    if level is None or level in tried:
        return beyond or Stop("no level between the ends of the bracket")
    return level


def _distance(level: str, levels: Range) -> float:
    """How far a level is from the dense one."""
    return abs(float(level) - levels.dense)


def _harsher(point: Point, levels: Range) -> str | None:
    """The first coarse level beyond a point's."""
    reached = _distance(point.level, levels)
    return next((level for level in levels.coarse if _distance(level, levels) > reached), None)


def _wider(harshest: Point, levels: Range, lowest: float) -> str | None:
    """A harsher coarse level, for scores whose damage is not `lowest` yet."""
    wanted = min(harshest.damage, harshest.slightest) < lowest
    return _harsher(harshest, levels) if wanted else None


def _end(
    known: Sequence[Point], below: int, side: int, resolution: float, levels: Range
) -> tuple[float, str | None]:
    """A level where the interval of the crossing ends; None if that is near, or levels are near it.

    Beside it how far apart those are between which it lies.

    Args:
        known: the dense model and all levels, the mildest first.
        below: the first of them below the bar.
        side: 1 for the lower end, where replicates that suffer more cross; -1 for the upper one.
        resolution: in induced sparsity.
        levels: range of the criterion.
    """
    seen = [replace(one, damage=one.damage + side * ERRORS * one.error) for one in known]
    end = next((i for i, one in enumerate(seen) if one.damage > 1), 0)
    if end in (0, below):
        return 0.0, None
    mild, harsh = seen[end - 1], seen[end]
    target = _target(seen, end, resolution)
    middle = (known[below - 1].sparsity + known[below].sparsity) / 2
    near, apart = abs(target - middle) <= AWAY * resolution, harsh.sparsity - mild.sparsity
    if near or apart <= APART * resolution:
        return 0.0, None
    return apart, _level_near(seen, mild, harsh, target, levels)


def _first(known: Sequence[Point]) -> Point:
    """The mildest level that sparsifies more than the dense model is sparse by itself."""
    return next((one for one in known[1:] if one.sparsity > known[0].sparsity), known[-1])


def _early(known: Sequence[Point], harsh: Point, tried: set[str]) -> float | None:
    """The sparsity of a level well before the bracket's harsh end; None if there is such a level."""
    dense = known[0].sparsity
    crossing = harsh.sparsity - dense
    there = (point.sparsity - dense for point in known if point.level in tried)
    if crossing <= 0 or any(added <= EARLY * crossing for added in there):
        return None
    return dense + EARLIER * crossing


def _placed(points: Sequence[Point]) -> list[Point]:
    """A failed level is as harsh as full sparsity."""
    return [
        replace(point, sparsity=1.0 if math.isnan(point.sparsity) else point.sparsity)
        for point in points
    ]


def _target(known: Sequence[Point], below: int, resolution: float) -> float:
    """Sparsity to try: just beyond the expected crossing, on the side of the farther end.

    Where the bracket begins at the dense model it is that of half the allowed damage: a level before
    the crossing is needed in any case.

    Args:
        known: the dense model and all levels, the mildest first.
        below: the first of them below the bar.
        resolution: in induced sparsity.
    """
    dense, mild, harsh = known[0].sparsity, known[max(below - 1, 0)], known[below]
    width = harsh.sparsity - mild.sparsity
    if not math.isfinite(harsh.damage):
        return mild.sparsity + width / 2
    offset, margin = 0.4 * resolution, 0.05
    if mild.damage > 0 and mild.sparsity > dense:
        # Damage grows like a power of the sparsity added: straight on logarithmic scales.
        share = math.log(mild.damage) / (math.log(mild.damage) - math.log(harsh.damage))
        added = (harsh.sparsity - dense) / (mild.sparsity - dense)
        crossing = dense + (mild.sparsity - dense) * float(added**share)
    else:
        wanted = BEFORE if below == 1 else 1.0
        if below > 1:
            margin = 1 / 3  # no damage at all tells nothing of where it begins
        power = _power(mild, harsh, known[below + 1 :])
        crossing = mild.sparsity + width * float((wanted / harsh.damage) ** (1 / power))
    crossing += offset if crossing - mild.sparsity < width / 2 else -offset
    # Never so near an end that a bad guess gains nothing.
    inside = max(margin * width, min(offset, width / 2))
    return min(max(crossing, mild.sparsity + inside), harsh.sparsity - inside)


def _power(mild: Point, harsh: Point, beyond: Sequence[Point]) -> float:
    """Power of sparsity by which damage grows beyond `mild`; 3.5 where only one level tells."""
    for point in beyond:
        if harsh.damage < point.damage < math.inf and point.sparsity > harsh.sparsity:
            stretch = (point.sparsity - mild.sparsity) / (harsh.sparsity - mild.sparsity)
            # Between a straight line and a step: a noisy score may say anything.
            return min(max(math.log(point.damage / harsh.damage) / math.log(stretch), 1.0), 8.0)
    return 3.5


def _level_near(
    known: Sequence[Point], mild: Point, harsh: Point, sparsity: float, levels: Range
) -> str | None:
    """A level between two points for a sparsity; None if no level lies between them."""
    # Without the levels that a noisy score put out of order, sparsity gives the level.
    ordered = mild.sparsity < harsh.sparsity
    return _short(mild, harsh, _level_at(known, sparsity, levels) if ordered else None)


def _level_at(known: Sequence[Point], sparsity: float, levels: Range) -> float | None:
    """Level that gives a sparsity, by monotone interpolation through the levels so far.

    The distance from the dense level grows like a power of the sparsity added, so both are taken
    on logarithmic scales; towards dense, the power of the mildest two levels goes on. Where there is
    one level, the harshest, which drops everything, gives the power. None where noise has put a level
    below the dense model's own sparsity.
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
            ys.append(math.log(_distance(point.level, levels)))
    wanted = math.log(sparsity - dense.sparsity)
    if len(xs) > 1 and wanted >= xs[0]:
        distance = float(PchipInterpolator(xs, ys)(wanted))
    else:
        if len(xs) > 1:
            power = (ys[1] - ys[0]) / (xs[1] - xs[0])
        else:
            end = math.log(abs(levels.harshest - levels.dense))
            beyond = math.log(1 - dense.sparsity) - xs[0]
            # Within what criteria have: a range may end far beyond where everything is dropped.
            power = min(max((end - ys[0]) / beyond, 1.0), 4.0) if beyond > 0 else 1.0
        distance = ys[0] + power * (wanted - xs[0])
    return levels.dense + math.copysign(
        math.exp(min(distance, max(ys))), levels.harshest - levels.dense
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
