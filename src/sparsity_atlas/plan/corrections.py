"""What jobs that were seen say of others: how much longer than forecast their start takes, and their work.

A job starts (imports, tasks, weights) before it works (passes, statistics, drawing). Many at once on a few
disks and cores start slowly and may work as fast as ever, so both have corrections of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparsity_atlas.plan.schedule import LIGHT, Key

EVALUATING = {"dense", "search", "evaluate", "sensitivity", "answers"}
# Work of these says nothing of others', nor theirs of it: it goes by widths on a CPU, or by a criterion.
APART = {"metrics", "calibrate", "truthfulness", "run_config"}
# These say how much of their work is done (`sparsity_atlas.progress`): one that has said nothing starts.
TELLING = {"capture", "metrics", "calibrate", "dense", "evaluate", "search", "output_error"}
TELLING |= {"sensitivity", "figures", "page"}
# The first job that runs a model on its tasks builds requests and has kernels compiled, which is kept: of
# other rules' starts its own says little.
COMPILING = {"dense"}
# Of a model's captures one works, and the others wait for it.
WAITING = {"capture"}
# What jobs of another model count.
ANOTHER_MODEL = 0.3
# Rules whose work is their criterion's, and what another one counts: `cett`'s takes four times `teal`'s.
BY_CRITERION, ANOTHER_CRITERION = {"calibrate"}, 0.3
# Distances: of the same rule, of a like one, of any. What farther ones count, in near jobs.
FARTHEST, KAPPA = 2, 0.2
# What the forecast itself counts, in jobs.
PRIOR = 0.02
# The least share of whole jobs' seconds that is taken for work; what is little of the whole says little.
LEAST = 0.05


@dataclass(frozen=True)
class Seconds:
    """Of a job.

    Attributes:
        start: until it begins what it is for.
        work: from then on.
    """

    start: float = 0.0
    work: float = 0.0

    @property
    def total(self) -> float:
        """Of the whole job."""
        return self.start + self.work

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.start + other.start, self.work + other.work)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.start * factor, self.work * factor)


@dataclass(frozen=True)
class Seen:
    """Jobs of a rule and a model, or one part of them.

    Attributes:
        key: of the first of them.
        took: seconds, of both parts together where both were forecast.
        forecast: of what was seen.
        count: how many jobs these are, older ones less than whole.
        told: whether it is a start whose end the job has said itself.
    """

    key: Key
    took: float
    forecast: Seconds
    count: float = 1.0
    told: bool = False

    @property
    def kind(self) -> tuple[Key, bool, bool, bool]:
        """What it can be added up with: what is known of a part is kept apart from what is of whole jobs."""
        criterion = self.key.criterion if self.key.rule in BY_CRITERION else ""
        key = Key(self.key.rule, self.key.model, criterion)
        return key, bool(self.forecast.start), bool(self.forecast.work), self.told

    def __add__(self, other: Seen) -> Seen:
        forecast = self.forecast + other.forecast
        took, count = self.took + other.took, self.count + other.count
        return Seen(self.key, took, forecast, count, self.told)

    def __mul__(self, factor: float) -> Seen:
        took, count = self.took * factor, self.count * factor
        return Seen(self.key, took, self.forecast * factor, count, self.told)


class _Part(NamedTuple):
    """A part of jobs."""

    key: Key
    took: float
    forecast: float
    jobs: float
    weight: float = 1.0  # what is little of the whole is hardly known
    told: bool = False


class Corrections:
    """By what factor starts and work of jobs are longer than forecast, from those that were seen."""

    def __init__(self, seen: Iterable[Seen]) -> None:
        """Divide what was seen between start and work.

        What a start takes is known of jobs that are nothing else, and of those that told of theirs; of others
        it is taken off, and the rest is work. As long as there are none, both are off by the same factor.

        Args:
            seen: whole jobs, or parts of them; those of which nothing was forecast say nothing.
        """
        sums: dict[tuple[Key, bool, bool, bool], Seen] = {}
        for one in seen:
            if one.forecast.total > 0:
                sums[one.kind] = sums[one.kind] + one if one.kind in sums else one
        self._found: dict[tuple[str, str, str], Seconds] = {}
        starting = [one for one in sums.values() if one.forecast.start]
        self._starts = [
            _Part(one.key, one.took * share, one.forecast.start, one.count, told=one.told)
            for one in [one for one in starting if not one.forecast.work] or starting
            for share in (one.forecast.start / one.forecast.total,)
        ]
        self._works = [self._work(one) for one in sums.values() if one.forecast.work]

    def _work(self, one: Seen) -> _Part:
        """Of whole jobs what is not their start."""
        usual = one.took / one.forecast.total
        factor = _factor(one.key, self._starts, _distance_of_starts, usual)
        share = 1 - factor * one.forecast.start / one.took if one.took else 1.0
        share = max(share, LEAST)
        return _Part(one.key, share * one.took, one.forecast.work, one.count, share)

    def expected(self, key: Key, forecast: Seconds) -> Seconds:
        """Of a job, corrected.

        Args:
            key: the job.
            forecast: of it.
        """
        kind = (key.rule, key.model, key.criterion)
        if kind not in self._found:
            self._found[kind] = self._factors(key)
        factor = self._found[kind]
        return Seconds(forecast.start * factor.start, forecast.work * factor.work)

    def _factors(self, key: Key) -> Seconds:
        start = _factor(key, self._starts, _distance_of_starts, 1.0)
        like = [one for one in self._starts if _distance_of_starts(key, one) == 0]
        alike = _factor(key, like, _distance_of_starts, 1.0)
        # Without a model work is more of what a start is; metrics and the like go by themselves.
        prior = 1.0 if key.rule in APART else start if key.rule in LIGHT else alike
        return Seconds(start, _factor(key, self._works, _distance, prior))


def _factor(
    key: Key,
    seen: Sequence[_Part],
    distance: Callable[[Key, _Part], int | None],
    prior: float,
) -> float:
    """What parts like this one's took over what was forecast of them.

    What is known of nearer jobs is drawn to what is known of farther ones, which count as `KAPPA` of one.

    Args:
        key: the job.
        seen: parts of jobs.
        distance: of one rule from another, up to `FARTHEST`; None: it says nothing.
        prior: what it is taken to be before any was seen: of work what starts are off by.
    """
    sums = [[0.0, 0.0, 0.0, 0.0] for _ in range(FARTHEST + 1)]
    for part in seen:
        place = distance(key, part)
        if place is not None:
            near = 1.0 if key.model == part.key.model else ANOTHER_MODEL
            if part.key.rule in BY_CRITERION and part.key.criterion != key.criterion:
                near *= ANOTHER_CRITERION
            one = sums[place]
            one[0] += near * part.weight * part.took
            one[1] += near * part.weight * part.forecast
            one[2] += near * part.forecast
            one[3] += part.jobs
    found, strength = prior, PRIOR
    for took, forecast, whole, count in reversed(sums):
        if count:
            weight = strength * whole / max(count, 1.0)
            found = (took + found * weight) / (forecast + weight)
            strength = KAPPA
    return found


def _distance(key: Key, part: _Part) -> int | None:
    other = part.key
    if key.rule == other.rule:
        return 0
    if key.rule in APART or other.rule in APART or other.rule in WAITING:
        return None
    if (key.rule in LIGHT) != (other.rule in LIGHT):
        return None  # how fast figures are drawn does not go by a model's passes
    return 1 if (key.rule in EVALUATING) == (other.rule in EVALUATING) else FARTHEST


def _distance_of_starts(key: Key, part: _Part) -> int | None:
    """All jobs with a model start alike, and all without one."""
    other = part.key
    if other.rule in WAITING or (other.rule in APART and not part.told):
        return 0 if key.rule == other.rule else None
    if other.rule in COMPILING and key.rule != other.rule:
        return None if key.rule in LIGHT else FARTHEST
    return 0 if (key.rule in LIGHT) == (other.rule in LIGHT) else FARTHEST
