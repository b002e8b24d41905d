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
from pathlib import Path
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.config.search_settings import FURTHER_LEVELS, SearchSettings
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.calibration_file import Calibration, read_calibration
from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.evaluation.damage_error import Values, read_values, score_error
from sparsity_atlas.evaluation.evaluate import evaluate_node, evaluation_code
from sparsity_atlas.evaluation.next_level import Point, Range, Stop, next_level
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table, sparsity_at
from sparsity_atlas.evaluation.session import Session
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.progress import Progress
from sparsity_atlas.tasks.score import choose_metric, pooled_score
from sparsity_atlas.terms import AVERAGE, IN_NATS, Kind, plain, tensors_at

HEADLINE = 0.99
ALLOWED_LOSS = math.log(1.01)


def read_scores(
    folder: Path, metrics: dict[str, tuple[Kind, str | None]]
) -> dict[str, float] | None:
    """Score of each task of a node; None if one of them failed, or its metric lacks in a document."""
    manifest = read_manifest(folder / "eval.json")
    if any(manifest["tasks"][task]["status"] != "ok" for task in metrics):
        return None
    _, table = read_table(folder / "samples.parquet")
    rows = table.select(["task", "metrics", "nats", "predicted"]).to_pylist()
    try:
        return {
            task: pooled_score(task, kind, key, [row for row in rows if row["task"] == task])
            for task, (kind, key) in metrics.items()
        }
    except TaskFailure:  # the curve's stage says why
        return None


def headline_tasks(metrics: dict[str, tuple[Kind, str | None]]) -> list[str]:
    """The tasks that the headline is read from: the first one with a loss, else all."""
    return [task for task, (kind, _) in metrics.items() if kind in IN_NATS][:1] or list(metrics)


def damage(
    metrics: dict[str, tuple[Kind, str | None]],
    dense: dict[str, float],
    scores: dict[str, float] | None,
) -> float:
    """Damage in units of what the headline bar allows; see `next_level.Point`.

    With a loss task, its added loss over ln 1.01; otherwise the lost share of the average accuracy
    over 1 %.
    """
    if scores is None:
        return math.inf
    first = headline_tasks(metrics)[0]
    if metrics[first][0] in IN_NATS:
        return (scores[first] - dense[first]) / ALLOWED_LOSS
    return _lost_accuracy(list(metrics), dense, scores)


def slightest(
    metrics: dict[str, tuple[Kind, str | None]],
    dense: dict[str, float],
    scores: dict[str, float] | None,
) -> float:
    """Damage to whichever suffered least: the headline, or beside a loss the average accuracy."""
    found = damage(metrics, dense, scores)
    accuracies = [task for task, (kind, _) in metrics.items() if kind == "accuracy"]
    if scores is None or not sum(dense[task] for task in accuracies):
        return found
    return min(found, _lost_accuracy(accuracies, dense, scores))


def damage_error(
    metrics: dict[str, tuple[Kind, str | None]], dense: dict[str, Values], own: dict[str, Values]
) -> float:
    """Standard error of `damage`, from what `read_values` gives; 0 where there is one unit alone.

    Args:
        metrics: of the headline's tasks.
        dense: of the dense model.
        own: of the level.
    """
    errors = [score_error(dense[task], own[task]) for task in metrics]
    found = math.hypot(*errors)
    if any(kind in IN_NATS for kind, _ in metrics.values()):
        found /= ALLOWED_LOSS
    else:
        before = sum(sum(value for _, value, _ in one) / len(one) for one in dense.values())
        found /= before * (1 - HEADLINE)
    return found if math.isfinite(found) else 0.0


def _lost_accuracy(tasks: list[str], dense: dict[str, float], scores: dict[str, float]) -> float:
    """The lost share of the average accuracy, in units of what the headline bar allows."""
    lost = 1 - sum(scores[task] for task in tasks) / sum(dense[task] for task in tasks)
    return lost / (1 - HEADLINE)


def allowed_damage(kind: Kind, bar: float) -> float:
    """What a bar allows, in units of what the headline's does; see `damage`."""
    return math.log1p(1 - bar) / ALLOWED_LOSS if kind in IN_NATS else (1 - bar) / (1 - HEADLINE)


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
    dense_manifest = read_manifest(dense_folder / "eval.json")
    baseline = {task: dense_manifest["tasks"][task] for task in session.tasks}
    usable = [task for task, result in baseline.items() if result["status"] == "ok"]
    # The average is of tasks as they are, without what is put before their prompts.
    usable = [task for task in usable if not session.tasks[task].inserted] or usable
    if not usable:
        # A result like any other: it counts as below every bar, and the report lists it.
        return _nothing("the dense model failed on every task")
    metrics = {
        task: choose_metric(task, settings["tasks"][task].get("metric"), baseline[task])
        for task in usable
    }
    dense = read_scores(dense_folder, metrics)
    assert dense is not None, "of tasks that did not fail"
    if not any(kind in IN_NATS for kind, _ in metrics.values()) and not sum(dense.values()):
        return _nothing("the dense model scores 0 on every task")
    rule = create(criterion)
    harshest = rule.lowest if rule.dense_level == rule.highest else rule.highest
    levels = Range(rule.dense_level, harshest, rule.coarse_levels)
    # The bracket is as wide as the headline's own curve says, which is over its own tasks' tokens.
    read_from = headline_tasks(metrics)
    dense_sparsity = induced(baseline, site, read_from)
    if site != plain(site):
        # What eval.json says of a tensor is of all parts and layers.
        dense_sparsity = sparsity_at(dense_folder / "samples.parquet", site, read_from)
    wanted = SearchSettings.model_validate(
        {name: settings[name] for name in SearchSettings.model_fields if name in settings}
    )
    further = [
        (allowed_damage(metrics[read_from[0]][0], bar), wanted.max_levels + number * FURTHER_LEVELS)
        for number, bar in enumerate(wanted.further, 1)
    ]
    headline = {task: metrics[task] for task in read_from}
    dense_values = read_values(dense_folder, headline)
    points: list[Point] = []
    seconds: list[float] = []
    progress = Progress("evaluated", wanted.most_levels, "levels", most=True)

    def told(share: float) -> None:
        progress.reach(len(points) + share)

    while True:
        level = next_level(
            points, dense_sparsity, levels, wanted.max_levels, wanted.resolution, further
        )
        if isinstance(level, Stop):
            break
        began = time.monotonic()
        node = Node.make(criterion, site, level, calibration)
        manifest = evaluate_node(session, node, folder / level, told=told)
        scores = read_scores(folder / level, metrics)
        point = Point(
            level,
            induced(manifest["tasks"], site, read_from),
            damage(metrics, dense, scores),
            slightest(metrics, dense, scores),
            damage_error(headline, dense_values, read_values(folder / level, headline))
            if scores is not None
            else 0.0,
        )
        points.append(point)
        seconds.append(time.monotonic() - began)
        left = wanted.most_levels - len(points)
        cli.logger.info(
            "level %s: %.1f %% sparse, %s, %.2f of the damage that the bar allows; took %.0f s, %s",
            *(level, 100 * point.sparsity, _told(metrics, dense, scores), point.damage),
            *(
                seconds[-1],
                f"at most {left} more, {left * max(seconds):.0f} s" if left else "the last",
            ),
        )
    cli.logger.info("stopped: %s", level.reason)
    first = read_from[0]
    others = [
        {"p": round(100 * (1 - bar), 8), "stopped": reason}
        for bar, reason in zip(wanted.further, level.further, strict=True)
    ]
    for one in others:
        cli.logger.info("at %g %%: %s", one["p"], one["stopped"])
    return {
        "headline": first if metrics[first][0] in IN_NATS else AVERAGE,
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


def _told(
    metrics: dict[str, tuple[Kind, str | None]],
    dense: dict[str, float],
    scores: dict[str, float] | None,
) -> str:
    """The headline's score in words, beside the dense model's."""
    if scores is None:
        return "failed"
    tasks = headline_tasks(metrics)
    if metrics[tasks[0]][0] in IN_NATS:
        return f"{tasks[0]} {scores[tasks[0]]:.4f} nats (dense {dense[tasks[0]]:.4f})"
    found, base = (100 * sum(one[task] for task in tasks) / len(tasks) for one in (scores, dense))
    return f"{tasks[0] if len(tasks) == 1 else AVERAGE} {found:.1f} % (dense {base:.1f} %)"


def _nothing(reason: str) -> dict[str, Any]:
    """What search.json says where there is nothing that sparsity could make worse."""
    return {"headline": None, "stopped": reason, "levels": []}


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
