"""What the rules ask of the key `studies` of the configuration, beside what curves ask."""

from __future__ import annotations

import json
from typing import Protocol

from sparsity_atlas.config import grid
from sparsity_atlas.rules.inputs import task_content
from sparsity_atlas.rules.question import question
from sparsity_atlas.rules.resources import Resources


class TaskWildcards(Protocol):
    """The parts of a path of one model's task."""

    model: str
    task: str


class StudyAsks(Resources):
    """The part of `Asks` that answers for studies of tasks."""

    def truthfulness_files(self) -> list[str]:
        """What tells right answers, of every model and task that is studied."""
        studied = grid.truthfulness(self._config)
        return [f"results/{model}/truthfulness/{task}.parquet" for model, task in studied]

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

    @question
    def truthfulness_settings(self, wildcards: TaskWildcards) -> str:
        """How it is found what tells right answers."""
        return grid.truthfulness_slice(self._config)
