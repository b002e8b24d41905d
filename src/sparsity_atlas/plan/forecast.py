"""What each job of a run will take: the jobs that are left, times what is known of the models."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.config.timings import timings
from sparsity_atlas.criteria import create, declared
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.figures.wanted import wanted
from sparsity_atlas.plan.captured_passes import (
    allocation_of,
    criterion_of,
    passes_of_a_level,
    passes_of_allocation,
    passes_of_reuse,
    site_of,
)
from sparsity_atlas.plan.dry_run import loadable_tasks
from sparsity_atlas.plan.jobs import UNKNOWN, Amount, Job, jobs, usual_levels
from sparsity_atlas.plan.model_facts import (
    NodeKey,
    Outlook,
    Unknowns,
    captured_tokens,
    look,
    measure,
)
from sparsity_atlas.plan.rates import (
    DRAWING_IMPORTS,
    area_seconds,
    curve_seconds,
    dimension_seconds,
    figure_seconds,
    importing,
    metrics_seconds,
    point_seconds,
    recorded,
)
from sparsity_atlas.plan.targets import missed_targets
from sparsity_atlas.plan.timing_cost import timing_seconds
from sparsity_atlas.terms import RESIDUAL, ROUTING, TENSORS
from sparsity_atlas.truthfulness.predictors import REPLICATES

# Rules whose jobs run a model, with what their stages import.
HEAVY = {"model", "capture", "dense", "evaluate", "search", "output_error", "calibrate"}
HEAVY |= {"sensitivity", "answers", "speed"}
# Those without a model that do more than start.
WORKING = {"metrics", "truthfulness"}
# What the tables' stage takes of a curve, as measured, in the time of its imports.
TABLES_OF_A_CURVE = 0.12
EVALUATING = ("dense", "evaluate", "search", "answers")


@dataclass
class Start:
    """Seconds that every job spends before its own work, and those of whole jobs in earlier runs."""

    light: float
    capture: float
    heavy: float
    tasks: float
    recorded: dict[str, float]
    drawing: dict[str, float] = field(default_factory=dict)


@dataclass
class Forecast:
    """What the plan prints.

    Attributes:
        jobs: of the whole run.
        seconds: that each of these takes; none for one that is done.
        outlooks: of each model.
        unknowns: what could not be found out.
        starts: seconds of each until it begins what it is for.
        targets: levels that calibrations at hand do not reach, a line each.
    """

    jobs: list[Job]
    seconds: list[Amount]
    outlooks: dict[str, Outlook]
    unknowns: Unknowns
    starts: list[float]
    targets: list[str] = field(default_factory=list)


def forecast(config: Config, results: Path) -> Forecast:
    """Look at everything that the configuration names and time what can be timed.

    Args:
        config: the configuration.
        results: folder of the results; it need not exist.
    """
    unknowns = Unknowns()
    every = jobs(config, results)
    with importing(anything=any(not job.done for job in every)) as imports:
        return _forecast(config, results, every, unknowns, imports)


def _forecast(
    config: Config,
    results: Path,
    every: list[Job],
    unknowns: Unknowns,
    imports: dict[str, Future[float]],
) -> Forecast:
    left = [job for job in every if not job.done]
    tasks = loadable_tasks(config, unknowns.note)
    began = time.perf_counter()
    # Again, since the first time imports what a job's own imports have, and reads what is kept then.
    loadable_tasks(config, Unknowns().note)
    tasks_seconds = time.perf_counter() - began
    outlooks = {}
    for model in grid.models(config):
        own = {name: tasks[name] for name in grid.model_tasks(config, model) if name in tasks}
        manifest = results / model / "model.json"
        outlook = outlooks[model] = look(config, model, own, manifest, unknowns)
        nodes = _nodes(config, [job for job in left if job.model == model])
        if outlook.parameters is not None and nodes:
            try:
                measure(config, model, outlook, nodes)
            except (AtlasError, OSError, RuntimeError, ValueError) as error:
                unknowns.note(f"speed of {model}", error)
        if outlook.parameters is not None and not outlook.shapes:
            unknowns.note(f"activations of {model}", "its FFNs are looked for in its weights")
    imported = {name: one.result() for name, one in imports.items()}
    start = Start(
        **{name: imported.pop(name, 0.0) for name in ("light", "capture", "heavy")},
        tasks=tasks_seconds,
        recorded=recorded(results / "benchmarks"),
        drawing=imported,
    )
    once = {model: _pass_seconds(config, outlook) for model, outlook in outlooks.items()}
    curves = {job.model for job in left if job.rule == "curve"}
    statistics = {model: _statistics_seconds(config, outlooks[model]) for model in curves}
    captured: set[str] = set()
    seconds = []
    for job in every:
        took = Amount() if job.done else _seconds(job, outlooks.get(job.model), start)
        if job.rule == "capture" and not job.done and job.model not in captured:
            # The first of a model's captures loads and runs the model for all of them.
            took = Amount.exactly(start.heavy + outlooks[job.model].ready) + once[job.model]
            captured.add(job.model)
        if job.rule == "curve" and not job.done and job.rule not in start.recorded:
            took += statistics[job.model]
        if job.rule == "metrics" and not job.done and job.rule not in start.recorded:
            took += _metrics_seconds(config, outlooks[job.model], job.site)
        if job.rule == "truthfulness" and not job.done and job.rule not in start.recorded:
            took += truthfulness_seconds(config, outlooks[job.model], job.task)
        ends = job.rule in ("tables", *DRAWING_IMPORTS) and job.rule not in start.recorded
        if ends and not job.done:
            took = _ending_seconds(config, job.rule, start)
        if job.rule == "calibrate" and not job.done and allocation_of(config, job) != "uniform":
            layers = outlooks[job.model].layers
            took += once[job.model] * passes_of_allocation(config, job, layers)
        if job.rule == "sensitivity" and not job.done:
            layers = outlooks[job.model].layers
            took += once[job.model] * (1 + layers * job.passes) if layers else UNKNOWN
        if job.rule == "speed" and not job.done and job.node is not None:
            parameters = outlooks[job.model].parameters
            timing = timings(config)[job.model, *job.node]
            took += Amount.exactly(timing_seconds(timing, parameters)) if parameters else UNKNOWN
        if job.rule == "output_error" and not job.done and job.rule not in start.recorded:
            share = outlooks[job.model].ffn_share
            curve = (job.model, job.node)
            reached = [one.nodes for one in every if (one.model, one.node) == curve]
            levels = sum(reached, Amount.exactly(1))
            whole = once[job.model]
            if share is None or not whole.complete:
                took += UNKNOWN
            else:
                took += levels * (share * whole.expected * passes_of_a_level(config, job))
                thresholds = len(config.studies.cett or ()) if site_of(job) == "intermediate" else 0
                took += Amount.exactly(share * whole.expected * thresholds / 3)
                if config.studies.prompt_reuse and grid.keeps_prompts(config, criterion_of(job)):
                    took += whole * passes_of_reuse(config, levels.expected - 1)
        seconds.append(took)
    targets = list(missed_targets(config, results, unknowns))
    starts = [_start_seconds(job, outlooks.get(job.model), start) for job in every]
    return Forecast(every, seconds, outlooks, unknowns, starts, targets)


def _ending_seconds(config: Config, rule: str, start: Start) -> Amount:
    """Seconds of a stage that shows what all others found."""
    if rule == "tables":
        curves = len(grid.curves(config))
        return Amount.exactly(start.light * (1 + TABLES_OF_A_CURVE * curves))
    from sparsity_atlas.report.report import MODEL_FIGURES

    compared = {(curve.model, curve.site) for curve in grid.curves(config)}
    # Some have a panel for each model, the others one for each site.
    panels = [len({pair[place] for pair in compared}) for place in (0, 1)]
    suffixes = ("svg", "png") if rule == "figures" else ("svg",)
    one = sum(figure_seconds(*suffixes, panels=count) for count in panels) / len(panels)
    drawn = len(wanted(config))
    if rule == "page":
        drawn = len(MODEL_FIGURES) * len(grid.models(config))
    return Amount.exactly(start.drawing[rule] + drawn * one)


def _start_seconds(job: Job, outlook: Outlook | None, start: Start) -> float:
    """Seconds of imports, of tasks where they are evaluated, and until a model is there; of others all."""
    outlook = outlook or Outlook()
    if job.rule == "capture":
        return start.heavy + outlook.ready
    if job.rule not in HEAVY:
        # Of metrics and the like what goes on is work, and of drawing; it is little of the others.
        return start.drawing.get(job.rule, start.light if job.rule in WORKING else math.inf)
    before = _before(job, outlook, start) if job.rule in EVALUATING else 0.0
    return start.heavy + outlook.ready + before


def _before(job: Job, outlook: Outlook, start: Start) -> float:
    """Seconds of tasks and their requests, and of what the first passes over them take longer."""
    known = (outlook.costs[task] for task in job.evaluations if task in outlook.costs)
    return start.tasks + outlook.first + sum(cost.building for cost in known)


def _nodes(config: Config, left: list[Job]) -> dict[NodeKey, Node | None]:
    """One node for each criterion and site that is still evaluated; the level matters little."""
    nodes: dict[NodeKey, Node | None] = {}
    for job in left:
        if job.rule in ("dense", "capture", "sensitivity", "answers"):
            nodes[None] = None
        elif job.rule in EVALUATING and job.node is not None and job.node not in nodes:
            criterion, site = job.node
            spec = json.loads(grid.criterion_slice(config, criterion))
            if declared(spec)["calibrated"]:
                # No threshold is known yet; to compare with one takes as long whatever it is.
                spec = {"rule": "threshold"}
            levels = create(spec).coarse_levels
            nodes[job.node] = Node.make(spec, site, levels[len(levels) // 2])
    return nodes


def _pass_seconds(config: Config, outlook: Outlook) -> Amount:
    """Seconds of the captured tokens' forward passes, at the speed of the model's dense baseline."""
    dense = outlook.seconds.get(None)
    if not dense:
        return UNKNOWN
    positions = sum(outlook.costs[task].positions for task in dense)
    return Amount.exactly(config.capture.tokens * sum(dense.values()) / positions)


def _statistics_seconds(config: Config, outlook: Outlook) -> Amount:
    """Seconds of the bootstrap and the fits of one of the model's curves, all its tasks together."""
    documents = [cost.documents for cost in outlook.costs.values()]
    if not documents:
        return UNKNOWN
    mean = max(sum(documents) // len(documents), 1)
    one = curve_seconds(config.replicates, mean, usual_levels(config))
    return Amount.exactly(one * (len(documents) + 1))  # of the average as well


def _metrics_seconds(config: Config, outlook: Outlook, site: str) -> Amount:
    """Seconds of a captured site's metrics."""
    if not outlook.shapes:
        return UNKNOWN
    tokens = captured_tokens(config)
    widths = [
        (shape[tensor], ROUTING[0] not in shape)
        for shape in outlook.shapes
        for tensor in TENSORS[site]
        if tensor in shape
    ]
    points = min(config.studies.lid or 0, tokens)
    return Amount.exactly(
        sum(
            metrics_seconds(tokens, width, ranked=ranked) + dimension_seconds(points, width)
            for width, ranked in widths
        )
    )


def truthfulness_seconds(config: Config, outlook: Outlook, task: str) -> Amount:
    """Seconds of the local dimensions of a task's answers, and of the areas that they come to.

    Args:
        config: that studies it.
        outlook: of the model.
        task: whose answers are studied.
    """
    asked = config.studies.truthfulness
    if asked is None or not outlook.shapes or task not in outlook.costs:
        return UNKNOWN
    samples = min(asked.samples, outlook.costs[task].documents)
    # The stream between layers is as wide as what the FFNs read.
    names = ["input" if tensor == RESIDUAL else tensor for tensor in asked.tensors]
    widths = [shape[name] for shape in outlook.shapes for name in names if name in shape]
    areas = area_seconds(samples, min(config.replicates, REPLICATES))
    found = sum(point_seconds(samples, width, asked.neighbours) for width in widths)
    # Two estimates, among all samples and in each half.
    return Amount.exactly(found + areas * (6 * len(widths) + 2 + len(asked.nodes)))


def _seconds(job: Job, outlook: Outlook | None, start: Start) -> Amount:
    """Seconds of one job, without a capture's and a study's passes over the captured text."""
    if job.rule in EVALUATING:
        return evaluation_seconds(job, outlook or Outlook(), start)
    if job.rule not in HEAVY:
        return Amount.exactly(start.recorded.get(job.rule, start.light))
    if job.rule == "capture":
        # The record of another model's captures says little: they are as long as it is large.
        return Amount.exactly(start.capture)
    alone = start.heavy + (outlook or Outlook()).ready
    if job.rule in ("sensitivity", "speed", "calibrate"):
        # What they take beside that follows from what they are asked: others' records say little of it.
        return Amount.exactly(alone)
    return Amount.exactly(start.recorded.get(job.rule, alone))


def evaluation_seconds(job: Job, outlook: Outlook, start: Start) -> Amount:
    """Seconds of a job that evaluates nodes.

    Args:
        job: the job.
        outlook: of its model.
        start: what every job spends.
    """
    times = outlook.seconds.get(job.node, {})
    total = Amount.exactly(start.heavy + outlook.ready + _before(job, outlook, start))
    for task, evaluations in job.evaluations.items():
        if task in times:
            total += evaluations * (times[task] + outlook.costs[task].overhead)
        else:
            total += UNKNOWN
    return total
