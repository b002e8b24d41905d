"""How long a run goes on: what was forecast of each job, corrected by the jobs that were seen.

Nothing here reads a clock or a file; whoever shows it says what began and ended, and when.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsity_atlas.plan.schedule import Key, makespan

EVALUATING = {"dense", "search", "evaluate", "sensitivity", "answers"}
LIGHT = {"run_config", "metrics", "curve", "model_summary", "tables", "figures", "page", "all"}
LIGHT |= {"truthfulness"}
# Jobs of these say nothing of others: a wide model's take eighty times their forecast, on a CPU.
APART = {"metrics"}
LAST = ("tables", "figures", "page")
# Of these the first job of a model does the work for all of them, whichever it is.
FIRST = {"capture"}
# How much a seen job says of another one: of the same rule, of a like one, of any; more for one model.
SAME_RULE, LIKE, OTHER = 1.0, 0.2, 0.02
ANOTHER_MODEL = 0.3
# What the forecast itself counts beside what was seen, in jobs that say as much as any other.
FORECAST = 0.02
# What was seen counts half once such a share of the time so far has passed since, but never less than a
# fifth: machines get busier, or less.
HALF_LIFE, OLDEST = 0.15, 0.2
# A job that takes longer than was expected is taken to be so far.
OVERDUE = 0.8


@dataclass
class _Running:
    key: Key
    began: float
    forecast: float
    rest: float | None = None  # as it said
    told_at: float = 0.0


@dataclass(frozen=True)
class _Seen:
    """What jobs of a rule and a model took, what was forecast of it, and when the last one ended."""

    took: float = 0.0
    forecast: float = 0.0
    at: float = 0.0


@dataclass
class TimeLeft:
    """The state of a run.

    Attributes:
        counts: jobs of each rule.
        forecast: seconds of each job, of all that may come: `counts` says how many do.
    """

    counts: dict[str, int]
    forecast: Iterable[tuple[Key, float]]
    _waiting: dict[str, list[tuple[Key, float]]] = field(init=False)
    _running: dict[int, _Running] = field(init=False, default_factory=dict)
    _begun: dict[str, int] = field(init=False)
    _seen: dict[Key, _Seen] = field(init=False)
    _start: float | None = field(init=False, default=None)
    _usual: dict[str, float] = field(init=False)
    _at_once: int = field(init=False, default=1)
    # What jobs took that had said a rest, and what was left of it when they ended.
    _told: float = field(init=False, default=0.0)
    _unused: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._waiting, self._begun = defaultdict(list), defaultdict(int)
        self._seen = {}
        for key, seconds in self.forecast:
            self._waiting[key.rule].append((key, seconds))
        self._usual = {
            rule: sum(seconds for _, seconds in jobs) / len(jobs)
            for rule, jobs in self._waiting.items()
        }

    def begin(self, job: int, key: Key, now: float) -> None:
        """A job was started."""
        self._start = now if self._start is None else self._start
        forecast = self._usual.get(key.rule, 0.0)
        waiting, first = self._waiting[key.rule], key.rule in FIRST
        own = [one for one in waiting if one[0] == key or (first and one[0].model == key.model)]
        if own:
            chosen = max(own, key=lambda one: one[1])
            forecast = chosen[1]
            waiting.remove(chosen)
        self._begun[key.rule] += 1
        self._running[job] = _Running(key, now, forecast)
        self._at_once = max(self._at_once, len(self._running))

    def reach(self, job: int, rest: float, now: float) -> None:
        """A running job says how many seconds it still takes, by those of its parts that have ended."""
        if job in self._running:
            one = self._running[job]
            one.rest, one.told_at = rest, now

    def finish(self, job: int, now: float) -> None:
        """A job has ended."""
        done = self._running.pop(job, None)
        if done is not None:
            if done.rest is not None:
                self._told += now - done.began
                self._unused += max(done.told_at + done.rest - now, 0.0)
            kind = Key(done.key.rule, done.key.model)
            before = self._seen.get(kind, _Seen(at=now))
            kept = self._freshness(before.at, now)
            self._seen[kind] = _Seen(
                kept * before.took + now - done.began, kept * before.forecast + done.forecast, now
            )

    def _freshness(self, at: float, now: float) -> float:
        """How much something counts that was seen before."""
        past = now - (now if self._start is None else self._start)
        return max(0.5 ** ((now - at) / (HALF_LIFE * past)), OLDEST) if past > 0 else 1.0

    def seconds_left(self, now: float) -> float | None:
        """Expected wall time until all is done; None before anything was seen."""
        seen = [
            (key, fresh * one.took, fresh * one.forecast)
            for key, one in self._seen.items()
            for fresh in (self._freshness(one.at, now),)
        ]
        spared = self._unused / (self._told or 1.0)
        for one in self._running.values():
            past = one.told_at - one.began
            if one.rest is not None and past > 0:
                rest = _spare(one.rest, past, spared)
                seen.append((one.key, past, one.forecast * past / (past + rest)))
        # A job that has not ended says something once it takes longer than those that have.
        seen += [
            (one.key, now - one.began, OVERDUE * one.forecast)
            for one in self._running.values()
            if one.rest is None and now - one.began > one.forecast * _ratio(one.key, seen) > 0
        ]
        if not seen:
            return None
        ratios: dict[tuple[str, str], float] = {}

        def expected(key: Key, forecast: float) -> float:
            kind = (key.rule, key.model)
            if kind not in ratios:
                ratios[kind] = _ratio(key, seen)
            return forecast * ratios[kind]

        running = [
            (one.key, _rest(one, expected(one.key, one.forecast), now, spared))
            for one in self._running.values()
        ]
        waiting: list[tuple[Key, float]] = []
        for rule, count in self.counts.items():
            count -= self._begun[rule]
            jobs = [(key, expected(key, seconds)) for key, seconds in self._waiting[rule]]
            if len(jobs) != count and count > 0:
                # Which of the forecast's jobs these are is not known.
                seconds = [one for _, one in jobs]
                usual = sum(seconds) / len(jobs) if jobs else self._usual.get(rule, 0.0)
                jobs = [(Key(rule), usual)] * count
            waiting += jobs if count > 0 else ()
        # One after the other, when all else is done.
        last = sum(seconds for key, seconds in (*running, *waiting) if key.rule in LAST)
        running, waiting = (
            [one for one in some if one[0].rule not in LAST] for some in (running, waiting)
        )
        return makespan(running, waiting, self._at_once) + last


def _spare(rest: float, past: float, spared: float) -> float:
    """What a job still takes that says at most so much.

    Args:
        rest: as it said.
        past: seconds it had taken by then.
        spared: of what ended jobs took, the share by which they ended earlier than they had said.
    """
    return max(rest - spared / (1 + spared) * (past + rest), 0.0)


def _rest(one: _Running, expected: float, now: float, spared: float) -> float:
    """Seconds that a running job still takes."""
    past = now - one.began
    if one.rest is not None:
        rest = _spare(one.rest, one.told_at - one.began, spared)
        return max(one.told_at + rest - now, 0.0)
    return max(expected - past, (1 - OVERDUE) / OVERDUE * min(past, expected))


def _ratio(key: Key, seen: Iterable[tuple[Key, float, float]]) -> float:
    """What jobs like this one took over what was forecast of them."""
    took = forecast = total = weight = 0.0
    for other, seconds, expected in seen:
        if expected <= 0:
            continue
        near = _nearness(key, other)
        took += near * seconds
        forecast += near * expected
        total += OTHER * expected
        weight += OTHER
    if not weight:
        return 1.0
    # The forecast itself, as one more job of the mean size.
    prior = FORECAST * total / weight
    return (took + prior * OTHER) / (forecast + prior * OTHER)


def _nearness(key: Key, other: Key) -> float:
    if other.rule in APART and key.rule != other.rule:
        return 0.0
    kinds = [rule in EVALUATING for rule in (key.rule, other.rule)]
    light = [rule in LIGHT for rule in (key.rule, other.rule)]
    like = kinds[0] == kinds[1] and light[0] == light[1]
    near = SAME_RULE if key.rule == other.rule else LIKE if like else OTHER
    return near if key.model == other.model else ANOTHER_MODEL * near
