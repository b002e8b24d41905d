"""How long a run goes on: what was forecast of each job, corrected by the jobs that were seen.

Nothing here reads a clock or a file; whoever shows it says what began and ended, and when.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsity_atlas.plan.corrections import Corrections, Seconds, Seen
from sparsity_atlas.plan.schedule import LAST, Key, makespan

# Of these the first job of a model does the work for all of them, whichever it is.
FIRST = {"capture"}
# What was seen counts half once such a share of the time so far has passed since, but never less than a
# fifth: machines get busier, or less.
HALF_LIFE, OLDEST = 0.15, 0.2
# Jobs were seen while many ran at once. Those that wait have fewer beside them, those that come last none: as
# powers of half that many, by a run on 32 cores, where the last ones took half as long; on two it is nothing.
FEWER, ALONE = -0.0875, -0.25
# A job that takes longer than was expected is taken to be so far.
OVERDUE = 0.8


@dataclass
class _Running:
    key: Key
    began: float
    forecast: Seconds
    rest: float | None = None  # as it said
    told_at: float = 0.0
    worked: float = 0.0  # up to then, since its start was over
    counted: float = 0.0  # of the work that was forecast, what this stands for


@dataclass
class TimeLeft:
    """The state of a run.

    Attributes:
        counts: jobs of each rule.
        forecast: seconds of each job, of all that may come: `counts` says how many do.
    """

    counts: dict[str, int]
    forecast: Iterable[tuple[Key, Seconds]]
    _waiting: dict[str, list[tuple[Key, Seconds]]] = field(init=False)
    _running: dict[int, _Running] = field(init=False, default_factory=dict)
    _begun: dict[str, int] = field(init=False)
    # Of each kind, and when the last of it ended.
    _seen: dict[tuple[Key, bool, bool], tuple[Seen, float]] = field(init=False)
    _start: float | None = field(init=False, default=None)
    _usual: dict[str, Seconds] = field(init=False)
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
            rule: sum((seconds for _, seconds in jobs), Seconds()) * (1 / len(jobs))
            for rule, jobs in self._waiting.items()
        }

    def begin(self, job: int, key: Key, now: float) -> None:
        """A job was started."""
        self._start = now if self._start is None else self._start
        forecast = self._usual.get(key.rule, Seconds())
        waiting, first = self._waiting[key.rule], key.rule in FIRST
        own = [one for one in waiting if one[0] == key or (first and one[0].model == key.model)]
        if own:
            chosen = max(own, key=lambda one: one[1].total)
            forecast = chosen[1]
            waiting.remove(chosen)
        self._begun[key.rule] += 1
        self._running[job] = _Running(key, now, forecast)
        self._at_once = max(self._at_once, len(self._running))

    def reach(self, job: int, worked: float, rest: float, now: float) -> None:
        """A running job says what those of its parts took that have ended, and what it still takes by them.

        Args:
            job: its number.
            worked: seconds since its start was over.
            rest: seconds to come.
            now: seconds on the clock.
        """
        one = self._running.get(job)
        if one is None:
            return
        if one.rest is None:
            took = max(now - one.began - worked, 0.0)  # a level's seconds are rounded
            self._see(Seen(one.key, took, Seconds(start=one.forecast.start)), now)
        more, whole = worked - one.worked, worked + self._spare(rest, now - one.began)
        share = min(more / whole, 1.0) if whole else 0.0
        done = Seconds(work=min(share * one.forecast.work, one.forecast.work - one.counted))
        self._see(Seen(one.key, more, done, share), now)
        one.counted += done.work
        one.rest, one.worked, one.told_at = rest, worked, now

    def finish(self, job: int, now: float) -> None:
        """A job has ended."""
        done = self._running.pop(job, None)
        if done is None:
            return
        if done.rest is None:
            took = (now - done.began) / self._alone(done.key)
            self._see(Seen(done.key, took, done.forecast), now)
            return
        self._told += now - done.began
        self._unused += max(done.told_at + done.rest - now, 0.0)
        # What it spared was forecast, too.
        left = Seconds(work=done.forecast.work - done.counted)
        past = self._freshness((done.began + now) / 2, now)
        self._see(Seen(done.key, now - done.told_at, left, 0.0) * past, now)

    def _see(self, one: Seen, now: float) -> None:
        before, at = self._seen.get(one.kind, (one * 0.0, now))
        self._seen[one.kind] = (before * self._freshness(at, now) + one, now)

    def _freshness(self, at: float, now: float) -> float:
        """How much something counts that was seen before."""
        past = now - (now if self._start is None else self._start)
        return max(0.5 ** ((now - at) / (HALF_LIFE * past)), OLDEST) if past > 0 else 1.0

    def seconds_left(self, now: float) -> float | None:
        """Expected wall time until all is done; None before anything was seen."""
        seen = [one * self._freshness(at, now) for one, at in self._seen.values()]
        # A job that has not ended says something once it takes longer than those that have.
        corrections = Corrections(seen)
        seen += [
            Seen(one.key, now - one.began, one.forecast * OVERDUE)
            for one in self._running.values()
            if one.rest is None
            and now - one.began > corrections.expected(one.key, one.forecast) > 0
        ]
        if not seen:
            return None
        corrections = Corrections(seen)

        def expected(key: Key, forecast: Seconds) -> float:
            return corrections.expected(key, forecast) * self._alone(key)

        running = [
            (one.key, self._rest(one, expected(one.key, one.forecast), now))
            for one in self._running.values()
        ]
        waiting: list[tuple[Key, float]] = []
        for rule, count in self.counts.items():
            count -= self._begun[rule]
            later = 1.0 if rule in LAST else self._crowd**FEWER
            jobs = [(key, expected(key, one) * later) for key, one in self._waiting[rule]]
            if len(jobs) != count and count > 0:
                # Which of the forecast's jobs these are is not known.
                seconds = [one for _, one in jobs]
                own = self._usual.get(rule, Seconds())
                usual = sum(seconds) / len(jobs) if jobs else own.total
                jobs = [(Key(rule), usual)] * count
            waiting += jobs if count > 0 else ()
        # One after the other, when all else is done.
        last = sum(seconds for key, seconds in (*running, *waiting) if key.rule in LAST)
        running, waiting = (
            [one for one in some if one[0].rule not in LAST] for some in (running, waiting)
        )
        return makespan(running, waiting, self._at_once) + last

    @property
    def _crowd(self) -> float:
        return max(self._at_once / 2, 1.0)

    def _alone(self, key: Key) -> float:
        """How much faster a job is than those that were seen, since it runs when no other does."""
        return self._crowd**ALONE if key.rule in LAST else 1.0

    def _spare(self, rest: float, past: float) -> float:
        """What a job still takes that says at most so much, by the share by which others ended earlier."""
        spared = self._unused / (self._told or 1.0)
        return max(rest - spared / (1 + spared) * (past + rest), 0.0)

    def _rest(self, one: _Running, expected: float, now: float) -> float:
        """Seconds that a running job still takes."""
        past = now - one.began
        if one.rest is not None:
            return max(one.told_at + self._spare(one.rest, one.told_at - one.began) - now, 0.0)
        return max(expected - past, (1 - OVERDUE) / OVERDUE * min(past, expected))
