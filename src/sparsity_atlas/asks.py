"""What the rules ask of the configuration: which files, and which slice of it a job depends on.

A rule names a method where Snakemake takes a function of the wildcards. Each answers one question.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from sparsity_atlas import criteria, grid
from sparsity_atlas.code import code_version
from sparsity_atlas.config import Config
from sparsity_atlas.inputs import model_content, task_content, text_content


class Wildcards(Protocol):
    """The parts of a path; a rule without a criterion in its path has no `criterion`."""

    model: str
    criterion: str
    site: str
    level: str


class Asks:
    """Answers for one configuration and one results folder (relative to the working directory).

    Attributes:
        config_text: the validated configuration as JSON.
        curves: of the run.
    """

    def __init__(self, config: Config, results: str) -> None:
        """Look at the configuration, and at the searches that have finished.

        Raises:
            AtlasError: a search.json is damaged.
        """
        self._config = config
        self._results = results
        self.config_text = json.dumps(config.model_dump(mode="json", exclude_none=True))
        self.curves = grid.curves(config)
        self.models = grid.models(config)
        self._by_key = {(curve.model, curve.criterion, curve.site): curve for curve in self.curves}
        self._searched = grid.searched_levels(config, results)

    # Files of the whole run

    def curve_files(self, name: str) -> list[str]:
        """A file of every curve's folder."""
        return [f"{self._results}/{curve.folder}/{name}" for curve in self.curves]

    def model_files(self, name: str) -> list[str]:
        """A file of every model's folder."""
        return [f"{self._results}/{model}/{name}" for model in self.models]

    def metric_files(self) -> list[str]:
        """Metrics of every model and site."""
        return [path for model in self.models for path in self._metrics_of(model)]

    def listed_nodes(self) -> list[str]:
        """Nodes of the levels that are listed."""
        nodes = grid.nodes(self._config)
        return [f"{self._results}/{curve.folder}/{level}/eval.json" for curve, level in nodes]

    def lost_nodes(self) -> list[str]:
        """Nodes of finished searches that were deleted, so that they are made again."""
        paths = (
            f"{self._results}/{curve.folder}/{level}/eval.json"
            for curve, levels in self._searched.items()
            for level in levels
        )
        return [path for path in paths if not Path(path).exists()]

    # Files of one model or curve

    def curve_of(self, wildcards: Wildcards) -> grid.Curve:
        """The curve of a path; one that no run block asks for has all the model's tasks."""
        key = (wildcards.model, wildcards.criterion, wildcards.site)
        return self._by_key.get(key) or grid.Curve(
            *key, auto=False, levels=(), tasks=self._tasks_of(wildcards.model)
        )

    def curve_nodes(self, wildcards: Wildcards) -> list[str]:
        """Listed nodes of a curve."""
        curve = self.curve_of(wildcards)
        return [f"{self._results}/{curve.folder}/{level}/eval.json" for level in curve.levels]

    def curve_search(self, wildcards: Wildcards) -> list[str]:
        """search.json of a curve whose levels are searched for."""
        curve = self.curve_of(wildcards)
        return [f"{self._results}/{curve.folder}/search.json"] if curve.auto else []

    def calibration(self, wildcards: Wildcards) -> list[str]:
        """The calibration of a curve whose criterion needs one."""
        if not criteria.declared(json.loads(self.criterion(wildcards)))["calibrated"]:
            return []
        return [f"{self._results}/{self.curve_of(wildcards).folder}/calibration.safetensors"]

    def exports(self) -> list[str]:
        """Exported thresholds of every curve whose criterion is calibrated."""
        return [
            f"{self._results}/{curve.folder}/thresholds.json"
            for curve in self.curves
            if criteria.declared(json.loads(grid.criterion_slice(self._config, curve.criterion)))[
                "calibrated"
            ]
        ]

    def search_of_node(self, wildcards: Wildcards) -> list[str]:
        """The search that left a node.

        Snakemake has no record of such a node, and sees by this whether it is still what the
        configuration asks for.
        """
        curve = self.curve_of(wildcards)
        searched = wildcards.level in self._searched.get(curve, ())
        return [f"{self._results}/{curve.folder}/search.json"] if searched else []

    def model_curves(self, wildcards: Wildcards) -> list[str]:
        """curve.json of every curve of a model."""
        return self._of_model(wildcards, "curve.json")

    def model_sparsity(self, wildcards: Wildcards) -> list[str]:
        """sparsity.parquet of every curve of a model."""
        return self._of_model(wildcards, "sparsity.parquet")

    def model_metrics(self, wildcards: Wildcards) -> list[str]:
        """Metrics of every site of a model."""
        return self._metrics_of(wildcards.model)

    def _of_model(self, wildcards: Wildcards, name: str) -> list[str]:
        own = (curve for curve in self.curves if curve.model == wildcards.model)
        return [f"{self._results}/{curve.folder}/{name}" for curve in own]

    def _metrics_of(self, model: str) -> list[str]:
        sites = grid.model_sites(self._config, model)
        return [f"{self._results}/{model}/metrics/{site}.parquet" for site in sites]

    # Slices of the configuration, and digests of the local files that it names

    def listed_levels(self, wildcards: Wildcards) -> str:
        """Listed levels of a curve, comma-separated."""
        return ",".join(self.curve_of(wildcards).levels)

    def requested_sites(self, wildcards: Wildcards) -> str:
        """Sites that the run asks of a model, comma-separated."""
        return ",".join(grid.model_sites(self._config, wildcards.model))

    def model_source(self, wildcards: Wildcards) -> str:
        """Where a model comes from."""
        return grid.fetch_slice(self._config, wildcards.model)

    def model_digest(self, wildcards: Wildcards) -> str:
        """Digest of a local model's files."""
        return model_content(self._config, wildcards.model)

    def store_settings(self, wildcards: Wildcards) -> str:
        """How a model is loaded beside its activations, and how these are split."""
        return grid.store_slice(self._config, wildcards.model)

    def capture_settings(self, wildcards: Wildcards) -> str:
        """How a model's activations are captured."""
        return grid.capture_slice(self._config, wildcards.model)

    def capture_text(self, wildcards: Wildcards) -> str:
        """Digest of the local text of the capture."""
        return text_content(self._config)

    def dense_settings(self, wildcards: Wildcards) -> str:
        """How a model's dense baseline is run."""
        return grid.evaluation_slice(self._config, wildcards.model, self._tasks_of(wildcards.model))

    def dense_tasks(self, wildcards: Wildcards) -> str:
        """Digests of the local files of a model's tasks."""
        return task_content(self._config, self._tasks_of(wildcards.model))

    def node_settings(self, wildcards: Wildcards) -> str:
        """How a curve's nodes are run."""
        tasks = self.curve_of(wildcards).tasks
        return grid.evaluation_slice(self._config, wildcards.model, tasks)

    def node_tasks(self, wildcards: Wildcards) -> str:
        """Digests of the local files of a curve's tasks."""
        return task_content(self._config, self.curve_of(wildcards).tasks)

    def search_settings(self, wildcards: Wildcards) -> str:
        """How a curve's levels are searched for."""
        return grid.search_slice(self._config, self.curve_of(wildcards).tasks)

    def curve_settings(self, wildcards: Wildcards) -> str:
        """How a curve's numbers are read from its samples."""
        return grid.curve_slice(self._config, self.curve_of(wildcards).tasks)

    def criterion(self, wildcards: Wildcards) -> str:
        """What a criterion is made from."""
        return grid.criterion_slice(self._config, wildcards.criterion)

    def criterion_code(self, stage: str) -> Callable[[Any], str]:
        """Code version of a stage with the criterion of the path."""

        def version(wildcards: Wildcards) -> str:
            spec = json.loads(self.criterion(wildcards))
            return code_version(stage, str(criteria.source_file(spec)))

        return version

    def _tasks_of(self, model: str) -> tuple[str, ...]:
        return grid.model_tasks(self._config, model) or tuple(self._config.tasks)
