"""How long some jobs take that wait for each other, so many at once."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Rules in the order in which one model's jobs wait for each other, and what their time goes by.
STAGES = (
    ("model",),
    ("capture", "dense"),
    ("calibrate", "metrics"),
    ("search", "evaluate", "sensitivity", "answers"),
    ("output_error", "curve", "export_curve", "truthfulness"),
    ("model_summary", "speed"),
)
# No job of the model waits for these.
BESIDE = {"metrics"}
# Then these, one after the other.
LAST = ("tables", "figures", "page")
_STAGE = {rule: stage for stage, rules in enumerate(STAGES) for rule in rules}
# Jobs without a model.
LIGHT = {"run_config", "metrics", "curve", "model_summary", "tables", "figures", "page", "all"}
LIGHT |= {"truthfulness"}
# Jobs up to which it is gone through who waits for whom. Of more, what the last ones wait for is little.
MOST = 500


@dataclass(frozen=True)
class Key:
    """What distinguishes a job in a forecast: rule, and of its wildcards those that it has."""

    rule: str
    model: str = ""
    criterion: str = ""
    site: str = ""
    task: str = ""

    @property
    def stage(self) -> int:
        """Which of `STAGES` it is in; what is in none waits for nothing."""
        return _STAGE.get(self.rule, 0)


Jobs = Sequence[tuple[Key, float]]


def makespan(running: Jobs, waiting: Jobs, at_once: int, models: int | None = None) -> float:
    """Seconds until the last job has ended.

    A job waits for those of its model in earlier stages that are of its site or of none; which of those that
    could begin does so first is not known, and taken to be the first.

    Args:
        running: jobs with the seconds that they still take.
        waiting: jobs with the seconds that they will take.
        at_once: how many run at a time, at the most.
        models: how many of them with a model, as GPUs let; None: all.
    """
    models = min(models or at_once, at_once)
    if len(waiting) > MOST:
        return _at_least([*running, *waiting], at_once, models)
    return _Run(running, waiting, at_once, models).end()


def _at_least(jobs: Jobs, at_once: int, models: int) -> float:
    """All of it by as many as run at once, or the longest chain of a model's jobs."""
    longest: dict[tuple[str, int], float] = defaultdict(float)
    for key, seconds in jobs:
        longest[key.model, key.stage] = max(longest[key.model, key.stage], seconds)
    chains: dict[str, float] = defaultdict(float)
    for (model, _), seconds in longest.items():
        chains[model] += seconds
    heavy = sum(seconds for key, seconds in jobs if key.rule not in LIGHT)
    whole = sum(seconds for _, seconds in jobs)
    return max(whole / at_once, heavy / models, *chains.values(), 0.0)


@dataclass
class _Run:
    running: Jobs
    waiting: Jobs
    at_once: int
    models: int
    _left: Counter[tuple[str, int, str]] = field(init=False, default_factory=Counter)
    _of_model: dict[str, list[int]] = field(init=False)

    def end(self) -> float:
        """See `makespan`."""
        self._of_model = defaultdict(list)
        for number, (key, _) in enumerate(self.waiting):
            self._of_model[key.model].append(number)
        for key, _ in (*self.running, *self.waiting):
            self._hold(key, 1)
        ends = [(seconds, number, key) for number, (key, seconds) in enumerate(self.running)]
        heapq.heapify(ends)
        ready = sorted(number for model in self._of_model for number in self._free(model))
        now, count = 0.0, len(ends)
        heavy = sum(key.rule not in LIGHT for *_, key in ends)
        while ends or ready:
            while len(ends) < self.at_once:
                job = self._next(ready, more=heavy < self.models)
                if job is None:
                    break
                ready.remove(job)
                key, seconds = self.waiting[job]
                heavy += key.rule not in LIGHT
                heapq.heappush(ends, (now + seconds, count, key))
                count += 1
            now, _, key = heapq.heappop(ends)
            heavy -= key.rule not in LIGHT
            self._hold(key, -1)
            ready = sorted([*ready, *self._free(key.model)])
        return now

    def _next(self, ready: Sequence[int], *, more: bool) -> int | None:
        """The first job that can begin; one with a model only if more of these can."""
        return next((i for i in ready if more or self.waiting[i][0].rule in LIGHT), None)

    def _hold(self, key: Key, number: int) -> None:
        """Count a job among those that later ones wait for, or no more."""
        if key.rule in BESIDE:
            return
        self._left[key.model, key.stage, key.site] += number
        if key.site:
            self._left[key.model, key.stage, "any"] += number

    def _free(self, model: str) -> Iterator[int]:
        """Waiting jobs of a model that nothing holds any more; each is given once."""
        held = []
        for number in self._of_model[model]:
            key, _ = self.waiting[number]
            other = key.site or "any"
            if any(
                self._left[model, stage, ""] or self._left[model, stage, other]
                for stage in range(key.stage)
            ):
                held.append(number)
            else:
                yield number
        self._of_model[model] = held
