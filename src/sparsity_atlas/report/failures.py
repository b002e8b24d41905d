"""What a run did not make, and what the logs say about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsity_atlas.activations.metrics import SCHEMAS as METRICS
from sparsity_atlas.config import grid
from sparsity_atlas.config.grid import Curve
from sparsity_atlas.config.schema import Config
from sparsity_atlas.config.timings import timings
from sparsity_atlas.criteria import declared
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.curves.equal_sparsity import SCHEMA as EQUAL
from sparsity_atlas.errors import AtlasError, one_line
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.speed.speed_table import SCHEMA as SPEED
from sparsity_atlas.studies.mask_table import SCHEMA as MASKS
from sparsity_atlas.studies.output_error import SCHEMAS as OUTPUT_ERROR
from sparsity_atlas.studies.prompt_table import SCHEMA as REUSE
from sparsity_atlas.studies.sensitivity import SCHEMAS as SENSITIVITY
from sparsity_atlas.terms import plain
from sparsity_atlas.truthfulness.truth_table import SCHEMA as TRUTHFULNESS

_ERROR = re.compile(r"error: |[\w.]*(Error|Exception|Interrupt|Exit)\b")
_LONGEST = 500
# Made by the jobs that make curve.json and sparsity.parquet, whose logs tell of both.
BESIDE = ("equal_sparsity.parquet", "masks.parquet", "prompt_reuse.parquet")


@dataclass(frozen=True)
class Failure:
    """An output that is missing or damaged, and why."""

    output: str
    reason: str


@dataclass(frozen=True)
class Remains:
    """What there is of a run: whole files, each with all that it was made from, and what is not there.

    not_started: outputs without a log, because something that they need is missing.
    asked: curves that the configuration asks for.
    """

    models: list[Path]
    curves: list[Path]
    sparsity: list[Path]
    metrics: list[Path]
    sensitivity: list[Path]
    truthfulness: list[Path]
    speed: list[Path]
    failures: list[Failure]
    not_started: list[str]
    asked: int


def take_stock(results: Path, config: Config) -> Remains:
    """Look at a results folder after a run that failed or was stopped.

    A file counts only if all that it was made from is there, too: an old curve of a model that
    could not be loaded again is not shown as if it were this run's.
    """
    folders = {model: results / model for model in grid.models(config)}
    models = {name: (folder / "model.json",) for name, folder in folders.items()}
    captures = {
        (name, site): (*models[name], folder / "capture" / f"{site}.json")
        for name, folder in folders.items()
        for site in grid.stored_sites(config, name)
    }
    metrics = [
        (*chain, folders[name] / "metrics" / f"{site}.parquet")
        for (name, site), chain in captures.items()
    ]
    curves, equals, calibrations, sensitivity, speed = [], [], [], [], []
    timed = timings(config)
    masks: list[tuple[Path, ...]] = []
    reuse: list[tuple[Path, ...]] = []
    sparsity: list[tuple[Path, ...]] = []
    for curve in grid.curves(config):
        folder = results / curve.folder
        search = (folder / "search.json",) if curve.auto else ()
        dense = folders[curve.model] / "dense" / "eval.json"
        nodes = _nodes(folder, curve)
        captured: tuple[Path, ...] = captures[curve.model, plain(curve.site)]
        if declared(json.loads(grid.criterion_slice(config, curve.criterion)))["calibrated"]:
            calibrations.append((*captured, folder / "calibration.safetensors"))
            captured = calibrations[-1]
        equals.append(
            (*models[curve.model], dense, *search, *nodes, folder / "equal_sparsity.parquet")
        )
        curves.append((*equals[-1], folder / "curve.json"))
        masks.append((*captured, *search, folder / "masks.parquet"))
        reuse.append((*masks[-1], folder / "prompt_reuse.parquet"))
        sparsity.append((*reuse[-1], folder / "sparsity.parquet"))
        if curve.sensitivity:
            sensitivity.append((*captured, folder / "sensitivity.parquet"))
        if (curve.model, curve.criterion, curve.site) in timed:
            speed.append((*captured, *curves[-1], folder / "speed.parquet"))
    truthfulness = [
        (
            *models[name],
            *(folders[name] / "answers" / f"{task}.{end}" for end in ("json", "parquet")),
            folders[name] / "truthfulness" / f"{task}.parquet",
        )
        for name, task in grid.truthfulness(config)
    ]
    damaged = {
        failure.output: failure
        for failure in (
            *_damaged(models.values(), read_manifest),
            *_damaged(captures.values(), read_manifest),
            *_damaged(curves, read_manifest),
            *_damaged(equals, lambda path: read_parquet(path, EQUAL)),
            *_damaged(calibrations, lambda path: read_calibration(path, "np")),
            *_damaged(metrics, lambda path: read_parquet(path, *METRICS)),
            *_damaged(masks, lambda path: read_parquet(path, MASKS)),
            *_damaged(reuse, lambda path: read_parquet(path, REUSE)),
            *_damaged(sparsity, lambda path: read_parquet(path, *OUTPUT_ERROR)),
            *_damaged(sensitivity, lambda path: read_parquet(path, *SENSITIVITY)),
            *_damaged(truthfulness, lambda path: read_parquet(path, TRUTHFULNESS)),
            *_damaged(speed, lambda path: read_parquet(path, SPEED)),
        )
    }
    missing = list(
        dict.fromkeys(
            path
            for chains in (
                *(models.values(), captures.values(), calibrations, metrics),
                *(curves, sparsity, sensitivity, truthfulness, speed),
            )
            for chain in chains
            for path in chain
            if not path.is_file() and path.name not in BESIDE
        )
    )
    reasons = {path: last_error(_log(path, results)) for path in missing}
    return Remains(
        models=_whole(models.values(), damaged),
        curves=_whole(curves, damaged),
        sparsity=_whole(sparsity, damaged),
        metrics=_whole(metrics, damaged),
        sensitivity=_whole(sensitivity, damaged),
        truthfulness=_whole(truthfulness, damaged),
        speed=_whole(speed, damaged),
        failures=[
            *(Failure(str(path), reason) for path, reason in reasons.items() if reason),
            *damaged.values(),
        ],
        not_started=[str(path) for path, reason in reasons.items() if not reason],
        asked=len(curves),
    )


def last_error(log: Path) -> str:
    """The last line of a log that tells what went wrong; empty if there is no log."""
    if not log.is_file():
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = list(filter(None, map(one_line, text.splitlines())))
    errors = [line for line in lines if _ERROR.match(line)]
    if errors:
        return errors[-1].removeprefix("error: ")[:_LONGEST]
    last = f"; the log's last line: {lines[-1]}" if lines else "; its log is empty"
    return f"stopped without an error message{last}"[:_LONGEST]


def _nodes(folder: Path, curve: Curve) -> tuple[Path, ...]:
    return tuple(folder / level / "eval.json" for level in curve.levels)


def _log(output: Path, results: Path) -> Path:
    return (results / "logs" / output.relative_to(results)).with_suffix(".log")


def _whole(chains: Iterable[tuple[Path, ...]], damaged: dict[str, Failure]) -> list[Path]:
    return [
        chain[-1]
        for chain in chains
        if all(path.is_file() and str(path) not in damaged for path in chain)
    ]


def _damaged(
    chains: Iterable[tuple[Path, ...]], read: Callable[[Path], object]
) -> Iterator[Failure]:
    """Files at the ends of chains that cannot be read."""
    for path in dict.fromkeys(chain[-1] for chain in chains):
        if path.is_file():
            try:
                read(path)
            except AtlasError as error:
                yield Failure(str(path), str(error).removeprefix(f"{path}: "))
