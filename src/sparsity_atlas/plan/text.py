"""The plan in words and tables."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from sparsity_atlas.activations.capture import tensors_of
from sparsity_atlas.config.schema import Config
from sparsity_atlas.plan.forecast import HEAVY, Forecast
from sparsity_atlas.plan.jobs import UNKNOWN, Amount, Job, usual_levels
from sparsity_atlas.plan.model_facts import Outlook, captured_tokens
from sparsity_atlas.plan.schedule import BESIDE, STAGES
from sparsity_atlas.terms import (
    STORED,
    tensors_at,
)

# Measured on the default run: a task of a node, a row of its sample table, a count of zeros in it.
TASK_BYTES, ROW_BYTES, ZEROS_BYTES = 5_000, 60, 5


def show(amount: Amount, rough: Callable[[float], str] | None = None) -> str:
    """An amount as the tables show it: 52, about 14 as ~14, at least 52 as ≥52, or unknown.

    Args:
        amount: to show.
        rough: spells a quantity that is an estimate anyway; without it this is a count.
    """
    number = rough or "{:,.0f}".format
    if not amount.complete:
        return f"≥{number(amount.expected)}" if amount.most else "unknown"
    return number(amount.expected) if amount.certain or rough else f"~{number(amount.expected)}"


def size(count: float) -> str:
    """Bytes as people say them."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def text(config: Config, forecast: Forecast, parallel: tuple[int, int]) -> str:
    """The whole plan, ready to be printed.

    Args:
        config: the configuration.
        forecast: of it.
        parallel: jobs that run at once, and those of them that have a model.
    """
    blocks = [
        _models(config, forecast),
        _tasks(forecast),
        _jobs(forecast),
        _time(forecast, parallel),
        _targets(forecast),
        _unknowns(forecast),
    ]
    return "\n".join(["", *filter(None, blocks)])


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """Right-aligned columns, the first one left-aligned."""
    cells = list(zip(columns, *rows, strict=True))
    widths = [max(map(len, column)) for column in cells]
    return "".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() + "\n"
        for row in zip(*cells, strict=True)
    )


def _models(config: Config, forecast: Forecast) -> str:
    columns: dict[str, Callable[[float], str] | None] = {
        "curves": None,
        "nodes": None,
        "done": None,
        "tokens to run": None,
        "activations": size,
        "samples": size,
        "one core": duration,
    }
    whole = dict.fromkeys(columns, Amount())
    rows = []
    for model, outlook in forecast.outlooks.items():
        mine = [i for i, job in enumerate(forecast.jobs) if job.model == model]
        jobs = [forecast.jobs[i] for i in mine]
        amounts = (
            Amount.exactly(sum(job.rule == "curve" for job in jobs)),
            _sum(job.nodes for job in jobs),
            Amount.exactly(sum(job.finished for job in jobs)),
            _sum(_tokens(job, outlook) for job in jobs),
            _store_bytes(config, outlook, jobs),
            _sum(_sample_bytes(job, outlook) for job in jobs),
            _sum(forecast.seconds[i] for i in mine),
        )
        whole = {name: whole[name] + one for name, one in zip(columns, amounts, strict=True)}
        parameters = "unknown" if outlook.parameters is None else f"{outlook.parameters:,}"
        if outlook.active is not None:
            parameters += f" ({outlook.active:,} active)"
        cells = [show(one, number) for one, number in zip(amounts, columns.values(), strict=True)]
        rows.append([model, parameters, *cells])
    rows.append(["all", "", *(show(whole[name], number) for name, number in columns.items())])
    notes = "Besides its nodes each model has a dense baseline.\n"
    if not whole["nodes"].certain:
        most = {name: Amount.exactly(amount.most) for name, amount in whole.items()}
        rows.append(["at most", "", *(show(most[name], columns[name]) for name in columns)])
        usual = usual_levels(config)
        notes += f"`levels: auto`: usually about {usual} nodes a curve.\n"
    return _table(["model", "parameters", *columns], rows) + notes


def _sum(amounts: Iterable[Amount]) -> Amount:
    return sum(amounts, Amount())


def _tokens(job: Job, outlook: Outlook) -> Amount:
    """Tokens that a job still has to run."""
    return _sum(
        evaluations * (outlook.costs[task].requests + outlook.costs[task].generation)
        if task in outlook.costs
        else UNKNOWN
        for task, evaluations in job.evaluations.items()
    )


def _store_bytes(config: Config, outlook: Outlook, jobs: list[Job]) -> Amount:
    """Bytes that are still to be captured."""
    captures = [job for job in jobs if job.rule == "capture"]
    there = [job.site for job in captures if job.done]
    tensors = set(tensors_of(job.site for job in captures))
    tensors -= set(tensors_of(there)) if there else set()
    if tensors and not outlook.shapes:
        return UNKNOWN
    return Amount.exactly(outlook.store_bytes(captured_tokens(config), sorted(tensors)))


def _sample_bytes(job: Job, outlook: Outlook) -> Amount:
    """Roughly the bytes of the sample tables and results that a job still has to write."""
    if job.evaluations and not outlook.shapes:
        return UNKNOWN
    tensors = tensors_at(job.node[1]) if job.node else STORED
    slots = len(outlook.shapes) * len(tensors)
    return _sum(
        evaluations
        * (TASK_BYTES + outlook.costs[task].documents * (ROW_BYTES + ZEROS_BYTES * slots))
        if task in outlook.costs
        else UNKNOWN
        for task, evaluations in job.evaluations.items()
    )


def _tasks(forecast: Forecast) -> str:
    """Tokens of one evaluation, for each task, and for each group of models that agree on them."""
    models: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for model, outlook in forecast.outlooks.items():
        for task, cost in outlook.costs.items():
            models[task, cost.documents, cost.requests, cost.generation].append(model)
    if not models:
        return ""
    rows = [
        [
            task,
            f"{documents:,}",
            f"{requests:,}",
            f"≤{new:,}" if new else "0",
            _names(names, forecast),
        ]
        for (task, documents, requests, new), names in sorted(models.items())
    ]
    return _table(["task", "documents", "tokens a node", "generated", "models"], rows)


def _names(models: list[str], forecast: Forecast) -> str:
    if len(models) > 1 and len(models) == len(forecast.outlooks):
        return f"all {len(models)}"
    return ", ".join(models)


def _jobs(forecast: Forecast) -> str:
    rows = []
    rules = list(dict.fromkeys(job.rule for job in forecast.jobs))
    for rule in [*rules, "all"]:
        mine = [i for i, job in enumerate(forecast.jobs) if rule in (job.rule, "all")]
        done = sum(forecast.jobs[i].done for i in mine)
        left = _sum(forecast.seconds[i] for i in mine)
        rows.append([rule, str(len(mine)), str(done), show(left, duration)])
    return _table(["rule", "jobs", "done", "one core"], rows)


def _time(forecast: Forecast, parallel: tuple[int, int]) -> str:
    left = _sum(forecast.seconds)
    if left == Amount():
        return "Nothing is left to do.\n"
    heavy = [job.rule in HEAVY for job in forecast.jobs]
    with_model = _sum(itertools.compress(forecast.seconds, heavy))
    number = sum(not job.done for job in forecast.jobs)
    cores, models = (min(number, one) for one in parallel)

    def least(which: str) -> float:
        of_all, of_models = (float(getattr(one, which)) for one in (left, with_model))
        return max(of_all / cores, of_models / models, _chain(forecast, which))

    text = f"{'about' if left.complete else 'at least'} {duration(least('expected'))}"
    if left.complete and not left.certain:
        text += f", at most {duration(least('most'))}"
    beside = f", {models} of them with a model," if models < cores else ""
    return f"Time: {text}, with {cores} jobs at once{beside} on a machine as busy as it is now.\n"


def _chain(forecast: Forecast, which: str) -> float:
    """Seconds of the longest chain of jobs that wait for each other."""
    longest: dict[str, Counter[str]] = defaultdict(Counter)
    for job, seconds in zip(forecast.jobs, forecast.seconds, strict=True):
        chain = longest[job.model]
        chain[job.rule] = max(chain[job.rule], getattr(seconds, which))
    shared = longest.pop("", Counter())
    # Metrics wait for a capture, and nothing of the model for them.
    beside = [chain["model"] + chain["capture"] + chain["metrics"] for chain in longest.values()]
    # Of a stage's rules none waits for another: the dense baseline runs beside the captures.
    others = [
        sum(max(chain[rule] for rule in stage if rule not in BESIDE) for stage in STAGES)
        for chain in longest.values()
    ]
    return max((*beside, *others), default=0) + sum(shared.values())


def _targets(forecast: Forecast) -> str:
    """Levels that calibrations here are known not to reach in some layers."""
    lines = [f"  {line}\n" for line in forecast.targets]
    return "".join(["Targets not reached on the calibration's tokens:\n", *lines]) if lines else ""


def _unknowns(forecast: Forecast) -> str:
    lines = [f"  {', '.join(what)}: {reason}" for reason, what in forecast.unknowns.items()]
    return "\n".join(["Unknown:", *lines, ""]) if lines else ""
