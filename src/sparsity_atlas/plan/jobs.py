"""Which jobs a configuration asks for, and which of them stand in the results already.

What stands is told by its files alone. Whether Snakemake makes something again because of an edited
model, task or source file shows in a dry run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sparsity_atlas.config import grid
from sparsity_atlas.config.grid import Curve
from sparsity_atlas.config.schema import Config
from sparsity_atlas.config.timings import timings
from sparsity_atlas.criteria import declared
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.terms import tensors_at

# Searches beside accuracies take 6 levels for most curves, those of a loss alone 4 to 6.
USUAL_LEVELS = 6
# And for each further bar; in simulations three bars took nine in all.
USUAL_FURTHER = 2


@dataclass(frozen=True)
class Amount:
    """A number that may not be certain before the run.

    Attributes:
        expected: what is expected of its known part.
        most: the largest that its known part can be.
        complete: whether all of it is known.
    """

    expected: float = 0
    most: float = 0
    complete: bool = True

    @classmethod
    def exactly(cls, number: float) -> Amount:
        """A number that is certain."""
        return cls(number, number)

    @property
    def certain(self) -> bool:
        """Whether this is the number."""
        return self.complete and self.expected == self.most

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.expected + other.expected,
            self.most + other.most,
            self.complete and other.complete,
        )

    def __mul__(self, factor: float) -> Amount:
        return Amount(self.expected * factor, self.most * factor, self.complete)


UNKNOWN = Amount(complete=False)


@dataclass(frozen=True)
class Job:
    """A job of the workflow.

    Attributes:
        rule: its rule.
        model: empty for jobs of the whole run.
        done: whether its output is there and holds all that is asked for.
        node: criterion and site, for jobs of a curve.
        site: of a capture.
        task: of a study of answers.
        nodes: that it leaves behind in all.
        finished: nodes of these that are there.
        evaluations: how often it has to run each task.
        passes: how often it runs the captured tokens for each layer.
    """

    rule: str
    model: str
    done: bool
    node: tuple[str, str] | None = None
    site: str = ""
    nodes: Amount = Amount()
    finished: int = 0
    evaluations: dict[str, Amount] = field(default_factory=dict)
    passes: int = 0
    task: str = ""


def jobs(config: Config, results: Path) -> list[Job]:
    """Every job of the target `all`.

    Args:
        config: the configuration.
        results: folder of the results; it need not exist.

    Raises:
        AtlasError: a damaged manifest among the results.
    """
    found = [Job("run_config", "", (results / "run_config.yaml").is_file())]
    for model in grid.models(config):
        folder = results / model
        found.append(Job("model", model, (folder / "model.json").is_file()))
        for site in grid.stored_sites(config, model):
            capture, metrics = folder / f"capture/{site}.json", folder / f"metrics/{site}.parquet"
            found.append(Job("capture", model, capture.is_file(), site=site))
            found.append(Job("metrics", model, metrics.is_file(), site=site))
        missing = _missing(folder / "dense", grid.model_tasks(config, model))
        found.append(Job("dense", model, not missing, evaluations=_once(missing)))
    for curve in grid.curves(config):
        found += _curve_jobs(config, curve, results / curve.folder)
    found += _truthfulness_jobs(config, results)
    for model in grid.models(config):
        found.append(Job("model_summary", model, (results / model / "summary.csv").is_file()))
    for rule, output in (
        ("tables", "critical_sparsity.csv"),
        ("figures", "figures"),
        ("page", "index.html"),
    ):
        found.append(Job(rule, "", (results / output).exists()))
    return found


def _missing(folder: Path, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Tasks that a node's folder has no result of."""
    path = folder / "eval.json"
    present = read_manifest(path)["tasks"] if path.is_file() else ()
    return tuple(task for task in tasks if task not in present)


def _once(tasks: tuple[str, ...]) -> dict[str, Amount]:
    return {task: Amount.exactly(1) for task in tasks}


def _curve_jobs(config: Config, curve: Curve, folder: Path) -> Iterator[Job]:
    node = (curve.criterion, curve.site)

    def evaluate(level: str) -> Job:
        missing = _missing(folder / level, curve.tasks)
        evaluations = _once(missing)
        done = not missing
        return Job(
            "evaluate", curve.model, done, node, "", Amount.exactly(1), int(done), evaluations
        )

    if declared(json.loads(grid.criterion_slice(config, curve.criterion)))["calibrated"]:
        yield Job("calibrate", curve.model, (folder / "calibration.safetensors").is_file(), node)
    yield from map(evaluate, curve.levels)
    if curve.auto:
        searched = searched_levels(folder)
        # A node that a finished search had made, and that was deleted, is made again by itself.
        deleted = [one for one in searched or () if not (folder / one / "eval.json").is_file()]
        yield from map(evaluate, [level for level in deleted if level not in curve.levels])
        yield _search(config, curve, folder, searched)
    for rule, name in (("output_error", "sparsity.parquet"), ("curve", "curve.json")):
        yield Job(rule, curve.model, (folder / name).is_file(), node)
    if curve.sensitivity:
        done = (folder / "sensitivity.parquet").is_file()
        passes = len(curve.sensitivity) * len(tensors_at(curve.site))
        yield Job("sensitivity", curve.model, done, node, passes=passes)
    if (curve.model, *node) in timings(config):
        yield Job("speed", curve.model, (folder / "speed.parquet").is_file(), node)


def _truthfulness_jobs(config: Config, results: Path) -> Iterator[Job]:
    """Answers and what tells right ones, and the nodes of these that no curve lists."""
    studied = grid.truthfulness(config)
    for model, task in studied:
        folder = results / model
        done = (folder / f"answers/{task}.json").is_file()
        # The task as in the dense baseline, and its answers once more.
        twice = {} if done else {task: Amount.exactly(2)}
        yield Job("answers", model, done, evaluations=twice, task=task)
        whole = (folder / f"truthfulness/{task}.parquet").is_file()
        yield Job("truthfulness", model, whole, task=task)
    listed = {f"{curve.folder}/{level}" for curve in grid.curves(config) for level in curve.levels}
    curves = {curve.folder: curve.tasks for curve in grid.curves(config)}
    asked = config.studies.truthfulness
    for model in dict.fromkeys(model for model, _ in studied):
        for node in asked.nodes if asked is not None else ():
            if f"{model}/{node}" not in listed:
                criterion, site, _ = node.split("/")
                tasks = curves.get(f"{model}/{criterion}/{site}", grid.model_tasks(config, model))
                missing = _missing(results / model / node, tasks)
                key = (criterion, site)
                one = Amount.exactly(1)
                yield Job(
                    *(
                        "evaluate",
                        model,
                        not missing,
                        key,
                        "",
                        one,
                        int(not missing),
                        _once(missing),
                    )
                )


def usual_levels(config: Config) -> int:
    """Levels that a search usually evaluates."""
    search = config.search
    return min(USUAL_LEVELS, search.max_levels) + USUAL_FURTHER * len(search.further)


def searched_levels(folder: Path) -> list[str] | None:
    """Levels of a finished search; None if there is none."""
    path = folder / "search.json"
    return [one["level"] for one in read_manifest(path)["levels"]] if path.is_file() else None


def _search(config: Config, curve: Curve, folder: Path, searched: list[str] | None) -> Job:
    """The search of a curve, continued where an earlier one was cut off."""
    begun = [path.parent.name for path in folder.glob("*/eval.json")]
    there = [level for level in begun if level in (searched or begun)]
    missing = [_missing(folder / level, curve.tasks) for level in there]
    if searched is not None:
        levels = Amount.exactly(len(there))
    else:
        most = config.search.most_levels
        levels = Amount(max(usual_levels(config), len(there)), max(most, len(there)))
    evaluations = {}
    for task in curve.tasks:
        with_task = sum(task not in one for one in missing)
        evaluations[task] = levels + Amount.exactly(-with_task)
    return Job(
        "search",
        curve.model,
        done=searched is not None and not any(missing),
        node=(curve.criterion, curve.site),
        nodes=levels,
        finished=sum(not one for one in missing),
        evaluations={task: amount for task, amount in evaluations.items() if amount.most},
    )
