"""What the rules ask of the keys `studies` and `speed` of the configuration, beside what curves ask."""

from __future__ import annotations

import functools
import json
import os
from typing import Protocol

from sparsity_atlas.config import grid
from sparsity_atlas.config.speed_settings import SpeedSettings
from sparsity_atlas.config.timings import Timing, timing_slice, timings
from sparsity_atlas.loading.devices import inside_allocation
from sparsity_atlas.plan.timing_cost import timing_seconds
from sparsity_atlas.rules.footprint import BASE_MINUTES, UNKNOWN_MINUTES
from sparsity_atlas.rules.inputs import task_content
from sparsity_atlas.rules.question import question
from sparsity_atlas.rules.resources import Resources, Wildcards


class TaskWildcards(Protocol):
    """The parts of a path of one model's task."""

    model: str
    task: str


class StudyAsks(Resources):
    """The part of `Asks` that answers for studies of tasks, and for times."""

    def truthfulness_files(self) -> list[str]:
        """What tells right answers, of every model and task that is studied."""
        studied = grid.truthfulness(self._config)
        return [f"results/{model}/truthfulness/{task}.parquet" for model, task in studied]

    def timing_files(self) -> list[str]:
        """speed.parquet of every curve that is timed."""
        return [f"results/{'/'.join(key)}/speed.parquet" for key in self._timings]

    @property
    def timed_curves(self) -> str:
        """Model, criterion and site of these: JSON."""
        return json.dumps(list(self._timings))

    @functools.cached_property
    def _timings(self) -> dict[tuple[str, str, str], Timing]:
        return timings(self._config)

    def _timing(self, wildcards: Wildcards) -> Timing:
        key = (wildcards.model, wildcards.criterion, wildcards.site)
        # A path that no run block asks for is timed as it would be by default.
        return self._timings.get(key) or Timing.of(SpeedSettings(device="cpu"))

    @question
    def timing_settings(self, wildcards: Wildcards) -> str:
        """How a curve is timed."""
        return timing_slice(self._config, self._timing(wildcards))

    @question
    def timing_threads(self, wildcards: Wildcards) -> int:
        """All cores of this machine; as `capture_threads` where a cluster gave them."""
        return 1 if inside_allocation() else len(os.sched_getaffinity(0))

    @question
    def timing_gpus(self, wildcards: Wildcards) -> int:
        """1 for a job that is timed on a GPU, wherever all others run."""
        return int(self._timing(wildcards).device == "cuda")

    @question
    def timing_minutes(self, wildcards: Wildcards, attempt: int) -> int:
        """Minutes of a curve's times."""
        sizes = self._needs.sizes(wildcards.model)
        if sizes is None:
            return attempt * UNKNOWN_MINUTES
        seconds = timing_seconds(self._timing(wildcards), sizes.active or sizes.parameters)
        return attempt * (BASE_MINUTES + round(2 * seconds / 60))

    @property
    def truthfulness(self) -> str:
        """Models and tasks that are studied: JSON."""
        return json.dumps(grid.truthfulness(self._config))

    @question
    def answers_settings(self, wildcards: TaskWildcards) -> str:
        """How a task is run whose answers are captured."""
        return grid.evaluation_slice(self._config, wildcards.model, (wildcards.task,))

    @question
    def answers_study(self, wildcards: TaskWildcards) -> str:
        """What is captured of the answers to a task."""
        return grid.answers_slice(self._config, wildcards.task)

    @question
    def answers_task(self, wildcards: TaskWildcards) -> str:
        """Digest of the local files of a task."""
        return task_content(self._config, (wildcards.task,))

    @question
    def truthfulness_nodes(self, wildcards: TaskWildcards) -> list[str]:
        """Nodes whose induced sparsity in each sample is tried."""
        asked = self._config.studies.truthfulness
        nodes = asked.nodes if asked is not None else ()
        return [f"results/{wildcards.model}/{node}/eval.json" for node in nodes]

    @functools.cached_property
    def _studied_nodes(self) -> frozenset[str]:
        asked = self._config.studies.truthfulness
        nodes = asked.nodes if asked is not None else ()
        models = {model for model, _ in grid.truthfulness(self._config)}
        return frozenset(f"{model}/{node}" for model in models for node in nodes)

    @question
    def truthfulness_settings(self, wildcards: TaskWildcards) -> str:
        """How it is found what tells right answers."""
        return grid.truthfulness_slice(self._config)
