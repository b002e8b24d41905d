"""How long a run goes on: what was forecast of each job, corrected by the jobs that were seen.

Nothing here reads a clock or a file; whoever shows it says what began and ended, and when.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsity_atlas.plan.corrections import TELLING, Corrections, Seconds, Seen
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
# Done when a job says something first, no more than such a share of its work is a start alone.
LITTLE = 0.1
# The share of a job that has to be seen to say as much of its rest as its forecast does.
EARLY = 0.02


@dataclass
class _Running:
    key: Key
    began: float
    forecast: Seconds
    held: float | None = None  # since when it waits for a GPU
    of: float = 0.0  # what it said last that there is to do, at the most; 0: it has said nothing
    done: float = 0.0  # share of this that was done then
    told_at: float = 0.0
    started: float = (
        0.0  # seconds until it said something first, if how much of them was work is not known
    )
    took: float = (
        0.0  # for what was done since it said something first, older parts less than whole
    )
    share: float = 0.0  # what was done in that time
    counted: float = 0.0  # of the work that was forecast, what all this stands for


@dataclass
class TimeLeft:
    """The state of a run.

    Attributes:
        counts: jobs of each rule.
        forecast: seconds of each job, of all that may come: `counts` says how many do.
        most: jobs that run at once (more, if more are seen), and those of them with a model.
    """

    counts: dict[str, int]
    forecast: Iterable[tuple[Key, Seconds]]
    most: tuple[int, int] = (1, 1)
    _waiting: dict[str, list[tuple[Key, Seconds]]] = field(init=False)
    _running: dict[int, _Running] = field(init=False, default_factory=dict)
    _begun: dict[str, int] = field(init=False)
    # Of each kind, and when the last of it ended.
    _seen: dict[tuple[Key, bool, bool, bool], tuple[Seen, float]] = field(init=False)
    _start: float | None = field(init=False, default=None)
    _usual: dict[str, Seconds] = field(init=False)
    # Whether jobs say how much of their work is done; None: nobody has had to yet.
    _heard: bool | None = field(init=False, default=None)
    _at_once: int = field(init=False, default=1)
    # Of each rule the shares of what they said there is to do, at the most, at which jobs ended.
    _ends: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self._waiting, self._begun = defaultdict(list), defaultdict(int)
        self._seen, self._ends = {}, defaultdict(list)
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

    def hold(self, job: int, now: float) -> None:
        """A running job waits for a GPU, which is no part of its start."""
        if (one := self._running.get(job)) is not None and one.held is None:
            one.held = now

    def go(self, job: int, now: float) -> None:
        """It waits no longer."""
        if (one := self._running.get(job)) is not None and one.held is not None:
            one.began, one.held = one.began + now - one.held, None

    def reach(self, job: int, done: float, of: float, now: float) -> None:
        """A running job says how much of its work is done. When it does so first, its start is over.

        Args:
            job: its number.
            done: in units of its own.
            of: how much there is to do, at the most.
            now: seconds on the clock.
        """
        one = self._running.get(job)
        if one is None or done <= 0 or of <= 0:
            return
        self._heard = True
        share = min(done / of, 1.0)
        more, took = share - one.done, now - one.told_at
        if not one.of:
            one.started = now - one.began
            if share <= LITTLE:
                self._see(Seen(one.key, one.started, Seconds(one.forecast.start), told=True), now)
                one.started = 0.0
        elif more <= 0:
            return
        else:
            if one.started:
                # By the pace since then its start was over before so much was done.
                worked = min(one.done * took / more, one.started)
                start = Seconds(one.forecast.start)
                self._see(Seen(one.key, one.started - worked, start, told=True), now)
                more, took, one.started = share, took + worked, 0.0
            work = min(more / self._end(one) * one.forecast.work, one.forecast.work - one.counted)
            self._see(Seen(one.key, took, Seconds(work=work), more), now)
            fresh = self._freshness(one.told_at, now)
            one.took, one.share = fresh * one.took + took, fresh * one.share + more
            one.counted += work
        one.of, one.done, one.told_at = of, share, now

    def finish(self, job: int, now: float) -> None:
        """A job has ended."""
        self.go(job, now)
        done = self._running.pop(job, None)
        if done is None:
            return
        if not done.of or done.started:
            if self._tells(done) and not done.of:
                self._heard = self._heard or False
            took = (now - done.began) / self._alone(done.key)
            self._see(Seen(done.key, took, done.forecast), now)
            return
        self._ends[done.key.rule].append(done.done)
        # What it spared was forecast, too.
        left = Seconds(work=done.forecast.work - done.counted)
        # It counts as much as what was not spared does by now.
        past = done.share / done.done
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
            Seen(one.key, now - one.began, self._unseen(one) * OVERDUE)
            for one in self._running.values()
            if not one.of
            and one.held is None
            and now - one.began > corrections.expected(one.key, self._unseen(one)).total > 0
        ]
        if not seen:
            return None
        corrections = Corrections(seen)

        def expected(key: Key, forecast: Seconds) -> Seconds:
            return corrections.expected(key, forecast) * self._alone(key)

        running: list[tuple[Key, float]] = []
        waiting: list[tuple[Key, float]] = []
        for one in self._running.values():
            at = now if one.held is None else one.held
            rest = self._rest(one, expected(one.key, one.forecast), at)
            (running if one.held is None else waiting).append((one.key, rest))
        for rule, count in self.counts.items():
            count -= self._begun[rule]
            later = 1.0 if rule in LAST else self._crowd**FEWER
            jobs = [(key, expected(key, one).total * later) for key, one in self._waiting[rule]]
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
        cores, models = self.most
        limit = models if models < cores else None
        return makespan(running, waiting, max(self._at_once, cores), limit) + last

    @property
    def _crowd(self) -> float:
        return max(self._at_once / 2, 1.0)

    def _alone(self, key: Key) -> float:
        """How much faster a job is than those that were seen, since it runs when no other does."""
        return self._crowd**ALONE if key.rule in LAST else 1.0

    def _end(self, one: _Running) -> float:
        """At what share a job ends that says at most how much there is to do, by others that came as far."""
        ends = [end for end in self._ends[one.key.rule] if end > one.done]
        return sum(ends) / len(ends) if ends else 1.0

    def _rest(self, one: _Running, expected: Seconds, now: float) -> float:
        """Seconds that a running job still takes."""
        if one.of:
            end = self._end(one)
            # Seconds of all that there is: as forecast, and more and more as it went.
            prior = expected.work / end or expected.total
            whole = (one.took + EARLY * prior) / (one.share + EARLY)
            return max((end - one.done) * whole - (now - one.told_at), 0.0)
        past, unseen = now - one.began, expected.start if self._tells(one) else expected.total
        more = max(unseen - past, (1 - OVERDUE) / OVERDUE * min(past, unseen))
        return more + expected.total - unseen

    def _tells(self, one: _Running) -> bool:
        """Whether a job will say when it has started; none does where logs cannot be read while they run."""
        both = one.forecast.start > 0 and one.forecast.work > 0
        return both and one.key.rule in TELLING and self._heard is not False

    def _unseen(self, one: _Running) -> Seconds:
        """What may be going on in a job that has said nothing yet."""
        return Seconds(one.forecast.start) if self._tells(one) else one.forecast
