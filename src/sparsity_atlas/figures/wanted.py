"""Which figures a configuration can fill; light, since every start of Snakemake asks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, TaskEntry
from sparsity_atlas.config.timings import timings
from sparsity_atlas.figures import FIGURES
from sparsity_atlas.loading.contents import speaks_of_experts, speaks_of_masks
from sparsity_atlas.tasks import yaml_tasks
from sparsity_atlas.terms import (
    LEAST_MODELS,
    by_projection,
    in_every_layer,
    layers_named,
    with_one_mask,
)


def wanted(config: Config) -> list[str]:
    """Names of the figures of a run, without those that have nothing to compare or to show.

    What some tasks of lm-eval's own ask for is not known before they ran, nor whether a model of the Hub has
    experts or fills masks in before it is fetched: such a figure is drawn in any case, and the report leaves
    it out.
    """
    curves = grid.curves(config)
    timed = timings(config).values()
    places = Counter((curve.model, curve.site) for curve in curves)
    named = {(curve.model, curve.criterion, curve.site) for curve in curves}
    beside = any(
        by_projection(site) and (model, criterion, with_one_mask(site)) in named
        for model, criterion, site in named
    )
    specs = {curve.criterion: grid.criterion_slice(config, curve.criterion) for curve in curves}
    losses, accuracies = _may_have(config)
    there = {
        **dict.fromkeys(("ppl_sparsity", "added_loss"), losses),
        **dict.fromkeys(("critical_sparsity", "retained_accuracy"), accuracies),
        **dict.fromkeys(("criteria", "comparison_error"), max(places.values()) > 1),
        "comparison": max(places.values()) > 1 or beside,
        **dict.fromkeys(
            ("inserted", "inserted_gates"),
            any(config.tasks[task].inserted for curve in curves for task in curve.tasks),
        ),
        "layer_profile": max(places.values()) > 1
        and any(json.loads(spec).get("rule") in grid.GLOBAL_RULES for spec in specs.values()),
        "twins": bool(grid.pairs(config)),
        "scaling": len(grid.models(config)) > 1,
        **dict.fromkeys(
            ("training", "training_limits"),
            any(config.models[name].series is not None for name in grid.models(config)),
        ),
        "foretelling": len(grid.models(config)) >= LEAST_MODELS,
        "phase_sparsity": _may_ask(config, yaml_tasks.GENERATED),
        **dict.fromkeys(("expert_sparsity", "expert_load"), _may(config, speaks_of_experts)),
        **dict.fromkeys(
            ("step_sparsity", "step_overlap", "step_layers"),
            # Whether a given answer is the likeliest is seen by filling it in.
            _may(config, speaks_of_masks)
            and _may_ask(config, yaml_tasks.GENERATED, "loglikelihood"),
        ),
        **dict.fromkeys(
            ("prompt_overlap", "prompt_overlap_layers", "prompt_loss"),
            config.studies.prompt_reuse is not None,
        ),
        "mask_recall": config.studies.predictors is not None,
        "cett": config.studies.cett is not None,
        "local_dimension": config.studies.lid is not None,
        "single_layers": max(_alone(curves).values(), default=0) > 1,
        "truthfulness": bool(grid.truthfulness(config)),
        "speed": any(one.contexts for one in timed),
        "speed_parts": bool(timed),
        "speed_batch": any(len(one.tokens) > 1 for one in timed),
        "sensitivity": any(curve.sensitivity for curve in curves),
        **dict.fromkeys(
            ("allocation", "allocation_damage"),
            any(
                json.loads(spec).get("allocation", "uniform") != "uniform"
                for spec in specs.values()
            ),
        ),
    }
    return [name for name in FIGURES if there.get(name, True)]


def _alone(curves: Iterable[grid.Curve]) -> Counter[tuple[str, str, str]]:
    """How many layers are sparsified alone, by model, criterion and site."""
    return Counter(
        (curve.model, curve.criterion, in_every_layer(curve.site))
        for curve in curves
        if len(layers_named(curve.site)) == 1
    )


def _asked(config: Config) -> Iterator[tuple[TaskEntry, set[str] | None]]:
    """The tasks of the curves, and what each asks a model for; None where that is not known."""
    for name in dict.fromkeys(task for curve in grid.curves(config) for task in curve.tasks):
        entry = config.tasks[name]
        yield entry, yaml_tasks.output_types(entry.include, entry.task or name, entry.override)


def _may_ask(config: Config, *kinds: str) -> bool:
    """Whether a task may have requests of some of these kinds."""
    return any(found is None or not found.isdisjoint(kinds) for _, found in _asked(config))


def _may_have(config: Config) -> tuple[bool, bool]:
    """Whether a task may have a loss, or its bound, and whether one may have an accuracy; see `score`."""
    asked = list(_asked(config))
    losses = any(found is None or found == {yaml_tasks.ROLLING} for _, found in asked)
    accuracies = any(
        found != {yaml_tasks.ROLLING} or entry.metric is not None for entry, found in asked
    )
    return losses, accuracies


def _may(config: Config, speaks: Callable[[Path], bool]) -> bool:
    """Whether a model's folder speaks of something, or is not there to be asked."""
    folders = (config.models[name].path for name in grid.models(config))
    return any(folder is None or speaks(Path(folder)) for folder in folders)
