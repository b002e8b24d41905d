"""Stage `search`: find the levels around the headline bar and further ones, all in one process with one
model load.

Each level it tries is an ordinary node, evaluated through the same function into the same folder; a
level that an earlier run finished costs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.config.search_settings import FURTHER_LEVELS, SearchSettings
from sparsity_atlas.criteria import Criterion, create
from sparsity_atlas.criteria.calibration_file import Calibration, read_calibration
from sparsity_atlas.evaluation.damage import (
    Metrics,
    Scores,
    Values,
    allowed_damage,
    damage,
    damage_error,
    headline_tasks,
    in_words,
    read_scores,
    read_values,
    slightest,
)
from sparsity_atlas.evaluation.evaluate import evaluate_node, evaluation_code
from sparsity_atlas.evaluation.next_level import Point, Range, Stop, next_level
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import sparsity_at
from sparsity_atlas.evaluation.session import Session
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.progress import Progress
from sparsity_atlas.tasks.score import choose_metric
from sparsity_atlas.terms import AVERAGE, IN_NATS, plain, tensors_at


def induced(results: dict[str, Any], site: str, tasks: list[str]) -> float:
    """Induced sparsity at a site: mean over some tasks' results, NaN if all of them failed."""
    shares = []
    for task in tasks:
        if results[task]["status"] == "ok":
            totals = [results[task]["sparsity"][tensor] for tensor in tensors_at(site)]
            shares.append(
                sum(one["zeros"] for one in totals) / sum(one["entries"] for one in totals)
            )
    return sum(shares) / len(shares) if shares else math.nan


@dataclass(frozen=True)
class Baseline:
    """The dense model on the tasks that a search looks at.

    Attributes:
        metrics: of each task.
        scores: of each task.
        site: where levels sparsify.
        sparsity: of the dense model there, over the headline's tasks.
        values: of the headline's samples.
    """

    metrics: Metrics
    scores: Scores
    site: str
    sparsity: float
    values: dict[str, Values]

    @property
    def read_from(self) -> list[str]:
        """The headline's tasks: the bracket is as wide as its own curve says, which is over their tokens."""
        return headline_tasks(self.metrics)

    @property
    def headline(self) -> str:
        """Its name."""
        first = self.read_from[0]
        return first if self.metrics[first][0] in IN_NATS else AVERAGE

    def compare(
        self, level: str, folder: Path, results: dict[str, Any]
    ) -> tuple[Point, Scores | None]:
        """What a level did, and its scores; None if a task failed.

        Args:
            level: its name.
            folder: of its node.
            results: of the node's tasks, as its manifest has them.
        """
        scores = read_scores(folder, self.metrics)
        error = 0.0
        if scores is not None:
            headline = {task: self.metrics[task] for task in self.read_from}
            error = damage_error(headline, self.values, read_values(folder, headline))
        point = Point(
            level,
            induced(results, self.site, self.read_from),
            damage(self.metrics, self.scores, scores),
            slightest(self.metrics, self.scores, scores),
            error,
        )
        return point, scores


def read_baseline(
    session: Session, folder: Path, site: str, tasks: dict[str, Any]
) -> Baseline | str:
    """What levels are compared with, or why there is nothing that sparsity could make worse.

    Args:
        session: model and tasks.
        folder: of the dense baseline.
        site: as paths spell it.
        tasks: what the configuration says of each, its `metric` among it.

    Raises:
        AtlasError: a metric is unknown.
    """
    manifest = read_manifest(folder / "eval.json")
    results = {task: manifest["tasks"][task] for task in session.tasks}
    usable = [task for task, result in results.items() if result["status"] == "ok"]
    # The average is of tasks as they are, without what is put before their prompts.
    usable = [task for task in usable if not session.tasks[task].inserted] or usable
    if not usable:
        return "the dense model failed on every task"
    metrics = {
        task: choose_metric(task, tasks[task].get("metric"), results[task]) for task in usable
    }
    scores = read_scores(folder, metrics)
    assert scores is not None, "of tasks that did not fail"
    if not any(kind in IN_NATS for kind, _ in metrics.values()) and not sum(scores.values()):
        return "the dense model scores 0 on every task"
    read_from = headline_tasks(metrics)
    sparsity = induced(results, site, read_from)
    if site != plain(site):
        # What eval.json says of a tensor is of all parts and layers.
        sparsity = sparsity_at(folder / "samples.parquet", site, read_from)
    values = read_values(folder, {task: metrics[task] for task in read_from})
    return Baseline(metrics, scores, site, sparsity, values)


def search(
    session: Session,
    criterion: dict[str, Any],
    site: str,
    dense_folder: Path,
    folder: Path,
    settings: dict[str, Any],
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Evaluate levels until the bar is bracketed; returns the content of search.json.

    Args:
        session: model and tasks.
        criterion: as `criteria.create` takes it.
        site: where, as paths spell it.
        dense_folder: the dense baseline's files.
        folder: holds one folder a level.
        settings: as `grid.search_slice` gives it.
        calibration: of the criterion, if it has one.

    Raises:
        AtlasError: a metric is unknown.
    """
    baseline = read_baseline(session, dense_folder, site, settings["tasks"])
    if isinstance(baseline, str):
        # A result like any other: it counts as below every bar, and the report lists it.
        return {"headline": None, "stopped": baseline, "levels": []}
    wanted = SearchSettings.model_validate(
        {name: settings[name] for name in SearchSettings.model_fields if name in settings}
    )
    kind, _ = baseline.metrics[baseline.read_from[0]]
    further = [
        (allowed_damage(kind, bar), wanted.max_levels + number * FURTHER_LEVELS)
        for number, bar in enumerate(wanted.further, 1)
    ]
    levels = _range(create(criterion))
    points: list[Point] = []
    seconds: list[float] = []
    progress = Progress("evaluated", wanted.most_levels, "levels", most=True)

    def told(share: float) -> None:
        progress.reach(len(points) + share)

    while True:
        level = next_level(
            points, baseline.sparsity, levels, wanted.max_levels, wanted.resolution, further
        )
        if isinstance(level, Stop):
            break
        began = time.monotonic()
        node = Node.make(criterion, site, level, calibration)
        manifest = evaluate_node(session, node, folder / level, told=told)
        point, scores = baseline.compare(level, folder / level, manifest["tasks"])
        points.append(point)
        seconds.append(time.monotonic() - began)
        words = in_words(baseline.metrics, baseline.scores, scores)
        _say_level(point, words, seconds, wanted.most_levels - len(points))
    cli.logger.info("stopped: %s", level.reason)
    others = [
        {"p": round(100 * (1 - bar), 8), "stopped": reason}
        for bar, reason in zip(wanted.further, level.further, strict=True)
    ]
    for one in others:
        cli.logger.info("at %g %%: %s", one["p"], one["stopped"])
    return {
        "headline": baseline.headline,
        "stopped": level.reason,
        **({"further": others} if others else {}),
        "levels": [
            {
                "level": point.level,
                "sparsity": None if math.isnan(point.sparsity) else point.sparsity,
                "damage": None if math.isinf(point.damage) else point.damage,
            }
            for point in points
        ],
    }


def _range(rule: Criterion) -> Range:
    """The levels of a criterion, from the one that changes nothing to the other end."""
    harshest = rule.lowest if rule.dense_level == rule.highest else rule.highest
    return Range(rule.dense_level, harshest, rule.coarse_levels)


def _say_level(point: Point, words: str, seconds: list[float], left: int) -> None:
    """Log what a level did, the last of those that took so many seconds, and what may be left."""
    rest = f"at most {left} more, {left * max(seconds):.0f} s" if left else "the last"
    cli.logger.info(
        "level %s: %.1f %% sparse, %s, %.2f of the damage that the bar allows; took %.0f s, %s",
        *(point.level, 100 * point.sparsity, words, point.damage, seconds[-1], rest),
    )


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas search", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--dense", required=True, type=Path, help="eval.json of the dense baseline")
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: tasks and how to run them"
    )
    parser.add_argument(
        "--search", default={}, type=json.loads, help="JSON: search settings and metrics"
    )
    parser.add_argument(
        "--code", help="code version, part of every fingerprint; unset: of this code"
    )
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    parser.add_argument("--site", required=True)
    parser.add_argument(
        "--calibration", type=cli.optional_path, help="calibration of the criterion, if it has one"
    )
    parser.add_argument("--output", required=True, type=Path, help="search.json to write")
    arguments = parser.parse_args()

    code = arguments.code or evaluation_code(arguments.criterion)
    calibration = read_calibration(arguments.calibration) if arguments.calibration else None
    session = Session.open(arguments.model, arguments.settings, code)
    if calibration is not None:
        session.check_disjoint(calibration)
    settings = {
        **SearchSettings().model_dump(),
        "tasks": {name: {} for name in session.tasks},
        **arguments.search,
    }
    folder = cli.folder_of(arguments.output)
    dense_folder = arguments.dense.parent
    content = search(
        session,
        arguments.criterion,
        arguments.site,
        dense_folder,
        folder,
        settings,
        calibration,
    )
    write_manifest(arguments.output, content)
