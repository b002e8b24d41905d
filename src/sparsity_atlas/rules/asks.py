"""What the rules ask of the configuration: which files, and which slice of it a job depends on.

A rule names a method where Snakemake takes a function of the wildcards. Each answers one question.
Snakemake asks for every job, and again whenever it looks for jobs to start, so whatever is the same for
all levels of a curve is worked out once.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from sparsity_atlas import criteria
from sparsity_atlas.code_version import code_version
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.config.selection import fold
from sparsity_atlas.criteria import in_experts
from sparsity_atlas.rules.inputs import model_content, task_content, text_content
from sparsity_atlas.rules.question import question
from sparsity_atlas.rules.resources import Wildcards
from sparsity_atlas.rules.study_asks import StudyAsks
from sparsity_atlas.terms import ATTENTION_TENSORS, EXPERTS, TENSORS, parts_named, plain


class Asks(StudyAsks):
    """Answers for one configuration and one results folder.

    Attributes:
        curves: of the run.
    """

    def __init__(self, config: Config, results: str) -> None:
        """Look at the configuration, and at the searches that have finished.

        Args:
            config: the configuration.
            results: where the results folder is. Paths in answers begin with plain `results`: in a
                module Snakemake itself puts the prefix before them.

        Raises:
            AtlasError: a search.json is damaged.
        """
        super().__init__(config, results)
        self._place = Path(results)
        self._config_text = json.dumps(config.model_dump(mode="json", exclude_none=True))
        self.curves = grid.curves(config)
        self._by_key = {(curve.model, curve.criterion, curve.site): curve for curve in self.curves}
        self._by_model: dict[str, list[grid.Curve]] = {model: [] for model in config.models}
        for curve in self.curves:
            self._by_model[curve.model].append(curve)
        self.models = tuple(model for model, own in self._by_model.items() if own)
        self._searched = grid.searched_levels(config, results)
        self._evaluation_slice = functools.cache(functools.partial(grid.evaluation_slice, config))
        self._task_content = functools.cache(functools.partial(task_content, config))
        self._criterion_slice = functools.cache(functools.partial(grid.criterion_slice, config))
        self._text_content = functools.cache(functools.partial(text_content, config))
        self._tasks_of = functools.cache(self._united_tasks)
        self._calibrated = functools.cache(self._is_calibrated)

    def config_text(self, wildcards: object = None) -> str:
        """The validated configuration as JSON. A function, since the braces in it are no wildcards."""
        return self._config_text

    # Files of the whole run

    def curve_files(self, name: str) -> list[str]:
        """A file of every curve's folder."""
        return [f"results/{curve.folder}/{name}" for curve in self.curves]

    def model_files(self, name: str) -> list[str]:
        """A file of every model's folder."""
        return [f"results/{model}/{name}" for model in self.models]

    def metric_files(self) -> list[str]:
        """Metrics of every model and site."""
        return [path for model in self.models for path in self._metrics_of(model)]

    def listed_nodes(self) -> list[str]:
        """Nodes of the levels that are listed."""
        return [path for curve in self.curves for path in self._nodes_of(curve)]

    def lost_nodes(self) -> list[str]:
        """Nodes of finished searches that were deleted, so that they are made again."""
        nodes = (
            f"{curve.folder}/{level}/eval.json"
            for curve, levels in self._searched.items()
            for level in levels
        )
        return [f"results/{node}" for node in nodes if not (self._place / node).exists()]

    @functools.cached_property
    def selection(self) -> str:
        """The curves of the run, folded."""
        return fold(self.curves)

    @functools.cached_property
    def pairs(self) -> str:
        """Pairs of models that are set side by side: JSON."""
        return json.dumps(grid.pairs(self._config))

    @functools.cached_property
    def checkpoints(self) -> str:
        """The models that are checkpoints of a training, with its name, theirs and their tokens: JSON."""
        found = grid.checkpoints(self._config)
        return json.dumps({model: astuple(one) for model, one in found.items()})

    # Files of one model or curve

    def curve_of(self, wildcards: Wildcards) -> grid.Curve:
        """The curve of a path; one that no run block asks for has all the model's tasks."""
        key = (wildcards.model, wildcards.criterion, wildcards.site)
        return self._by_key.get(key) or grid.Curve(
            *key, auto=False, levels=(), tasks=self._tasks_of(wildcards.model)
        )

    @question
    def curve_nodes(self, wildcards: Wildcards) -> list[str]:
        """Listed nodes of a curve."""
        return self._nodes_of(self.curve_of(wildcards))

    @question
    def curve_search(self, wildcards: Wildcards) -> list[str]:
        """search.json of a curve whose levels are searched for."""
        curve = self.curve_of(wildcards)
        return [f"results/{curve.folder}/search.json"] if curve.auto else []

    @question
    def capture(self, wildcards: Wildcards) -> str:
        """The captured activations of a curve's site, which are those of all parts."""
        return f"results/{wildcards.model}/capture/{plain(wildcards.site)}.json"

    @question
    def calibration(self, wildcards: Wildcards) -> list[str]:
        """The calibration of a curve whose criterion needs one."""
        if not self._calibrated(wildcards.criterion):
            return []
        return [f"results/{self.curve_of(wildcards).folder}/calibration.safetensors"]

    def exports(self) -> list[str]:
        """Exported thresholds of every curve whose criterion is calibrated."""
        return [
            f"results/{curve.folder}/thresholds.json"
            for curve in self.curves
            if self._calibrated(curve.criterion)
        ]

    def sensitivity_files(self) -> list[str]:
        """sensitivity.parquet of every curve whose layers are looked at one by one."""
        return [f"results/{curve.folder}/sensitivity.parquet" for curve in self._studied()]

    @functools.cached_property
    def studies(self) -> str:
        """The curves whose layers are looked at one by one, folded."""
        return fold(self._studied())

    def _studied(self) -> list[grid.Curve]:
        return [curve for curve in self.curves if curve.sensitivity]

    @question
    def search_of_node(self, wildcards: Wildcards) -> list[str]:
        """The search that left a node.

        Snakemake has no record of such a node, and sees by this whether it is still what the
        configuration asks for. A node that a study names has a record of its own, from before the search
        came to its level: another set of inputs would make it anew.
        """
        curve = self.curve_of(wildcards)
        level = wildcards.level
        searched = level in self._searched.get(curve, ())
        named = f"{curve.folder}/{level}" in self._studied_nodes
        return [f"results/{curve.folder}/search.json"] if searched and not named else []

    @question
    def model_curves(self, wildcards: Wildcards) -> list[str]:
        """curve.json of every curve of a model."""
        return self._of_model(wildcards, "curve.json")

    @question
    def model_sparsity(self, wildcards: Wildcards) -> list[str]:
        """sparsity.parquet of every curve of a model."""
        return self._of_model(wildcards, "sparsity.parquet")

    @question
    def model_metrics(self, wildcards: Wildcards) -> list[str]:
        """Metrics of every site of a model."""
        return self._metrics_of(wildcards.model)

    def _of_model(self, wildcards: Wildcards, name: str) -> list[str]:
        own = self._by_model[wildcards.model]
        return [f"results/{curve.folder}/{name}" for curve in own]

    def _metrics_of(self, model: str) -> list[str]:
        sites = dict.fromkeys(plain(site) for site in self._sites_of(model))
        return [f"results/{model}/metrics/{site}.parquet" for site in sites]

    def _nodes_of(self, curve: grid.Curve) -> list[str]:
        return [f"results/{curve.folder}/{level}/eval.json" for level in curve.levels]

    def _sites_of(self, model: str) -> list[str]:
        return list(dict.fromkeys(curve.site for curve in self._by_model[model]))

    # Slices of the configuration, and digests of the local files that it names

    @question
    def listed_levels(self, wildcards: Wildcards) -> str:
        """Listed levels of a curve, comma-separated."""
        return ",".join(self.curve_of(wildcards).levels)

    @question
    def sensitivity_levels(self, wildcards: Wildcards) -> str:
        """Levels at which one layer at a time is sparsified, comma-separated."""
        return ",".join(self.curve_of(wildcards).sensitivity)

    @question
    def sensitivity_settings(self, wildcards: Wildcards) -> str:
        """How what single layers cost is measured."""
        return grid.sensitivity_slice(self._config, wildcards.model)

    @question
    def requested_sites(self, wildcards: Wildcards) -> str:
        """Sites that the run asks of a model, comma-separated."""
        return ",".join(self._sites_of(wildcards.model))

    @question
    def not_in_experts(self, wildcards: Wildcards) -> str:
        """What the run asks of a model that does not work if it has routed experts: JSON, a line each."""
        lines = []
        for curve in self._by_model[wildcards.model]:
            spec = json.loads(self._criterion_slice(curve.criterion))
            why = in_experts.why_not(criteria.declared(spec), spec)
            beside = set(TENSORS[plain(curve.site)]) - set(ATTENTION_TENSORS)
            if why is not None and beside and EXPERTS in (parts_named(curve.site) or (EXPERTS,)):
                lines.append(f"criteria.{curve.criterion} at {curve.site}: {why}")
        return json.dumps(lines)

    @question
    def model_source(self, wildcards: Wildcards) -> str:
        """Where a model comes from."""
        return grid.fetch_slice(self._config, wildcards.model)

    @question
    def model_digest(self, wildcards: Wildcards) -> str:
        """Digest of a local model's files."""
        return model_content(self._config, wildcards.model)

    @question
    def store_settings(self, wildcards: Wildcards) -> str:
        """How a model is loaded beside its activations, and how these are split."""
        return grid.store_slice(self._config, wildcards.model)

    @question
    def error_settings(self, wildcards: Wildcards) -> str:
        """How output errors and masks are measured."""
        return grid.error_slice(self._config, wildcards.model)

    @property
    def dimension_points(self) -> int:
        """Captured tokens among which local dimensions are estimated; 0: they are not."""
        return self._config.studies.lid or 0

    @question
    def capture_settings(self, wildcards: Wildcards) -> str:
        """How a model's activations are captured."""
        return grid.capture_slice(self._config, wildcards.model)

    @question
    def capture_text(self, wildcards: Wildcards) -> str:
        """Digest of the local text of the capture."""
        return self._text_content()

    @question
    def dense_settings(self, wildcards: Wildcards) -> str:
        """How a model's dense baseline is run."""
        return self._evaluation_slice(wildcards.model, self._tasks_of(wildcards.model))

    @question
    def dense_tasks(self, wildcards: Wildcards) -> str:
        """Digests of the local files of a model's tasks."""
        return self._task_content(self._tasks_of(wildcards.model))

    @question
    def dense_metrics(self, wildcards: Wildcards) -> str:
        """The metrics that a model's curves are drawn from."""
        return grid.metrics_slice(self._config, self._tasks_of(wildcards.model))

    @question
    def node_metrics(self, wildcards: Wildcards) -> str:
        """The metrics that a node's curve is drawn from."""
        return grid.metrics_slice(self._config, self.curve_of(wildcards).tasks)

    @question
    def node_settings(self, wildcards: Wildcards) -> str:
        """How a curve's nodes are run."""
        tasks = self.curve_of(wildcards).tasks
        return self._evaluation_slice(wildcards.model, tasks)

    @question
    def node_tasks(self, wildcards: Wildcards) -> str:
        """Digests of the local files of a curve's tasks."""
        return self._task_content(self.curve_of(wildcards).tasks)

    @question
    def search_settings(self, wildcards: Wildcards) -> str:
        """How a curve's levels are searched for."""
        return grid.search_slice(self._config, self.curve_of(wildcards).tasks)

    @question
    def curve_settings(self, wildcards: Wildcards) -> str:
        """How a curve's numbers are read from its samples."""
        return grid.curve_slice(self._config, self.curve_of(wildcards).tasks)

    @question
    def criterion(self, wildcards: Wildcards) -> str:
        """What a criterion is made from."""
        return self._criterion_slice(wildcards.criterion)

    def criterion_code(self, stage: str) -> Callable[[Any], str]:
        """Code version of a stage with the criterion of the path."""

        @functools.cache
        def of(criterion: str) -> str:
            spec = json.loads(self._criterion_slice(criterion))
            return code_version(stage, str(criteria.source_file(spec)))

        def version(wildcards: Wildcards) -> str:
            return of(wildcards.criterion)

        # Asked for once a job, and slow to make.
        vars(version)["__signature__"] = inspect.signature(version)
        return version

    def _is_calibrated(self, criterion: str) -> bool:
        return bool(criteria.declared(json.loads(self._criterion_slice(criterion)))["calibrated"])

    def _united_tasks(self, model: str) -> tuple[str, ...]:
        """Tasks of a model's curves, in the order of the catalogue; all tasks, if it has no curve."""
        used = {task for curve in self._by_model[model] for task in curve.tasks}
        return tuple(task for task in self._config.tasks if task in used or not used)
