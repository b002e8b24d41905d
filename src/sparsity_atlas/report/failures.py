"""What a run did not make, and what the logs say about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
    chains = _Chains.of(results, config)
    damaged = {failure.output: failure for failure in chains.damaged()}
    reasons = {path: last_error(_log(path, results)) for path in chains.missing()}
    return Remains(
        models=_whole(chains.models, damaged),
        curves=_whole(chains.curves, damaged),
        sparsity=_whole(chains.sparsity, damaged),
        metrics=_whole(chains.metrics, damaged),
        sensitivity=_whole(chains.sensitivity, damaged),
        truthfulness=_whole(chains.truthfulness, damaged),
        speed=_whole(chains.speed, damaged),
        failures=[
            *(Failure(str(path), reason) for path, reason in reasons.items() if reason),
            *damaged.values(),
        ],
        not_started=[str(path) for path, reason in reasons.items() if not reason],
        asked=len(chains.curves),
    )


Chain = tuple[Path, ...]


@dataclass
class _Chains:
    """Outputs by kind, each behind all that it is made from."""

    models: list[Chain] = field(default_factory=list)
    captures: list[Chain] = field(default_factory=list)
    metrics: list[Chain] = field(default_factory=list)
    calibrations: list[Chain] = field(default_factory=list)
    equals: list[Chain] = field(default_factory=list)
    curves: list[Chain] = field(default_factory=list)
    masks: list[Chain] = field(default_factory=list)
    reuse: list[Chain] = field(default_factory=list)
    sparsity: list[Chain] = field(default_factory=list)
    sensitivity: list[Chain] = field(default_factory=list)
    truthfulness: list[Chain] = field(default_factory=list)
    speed: list[Chain] = field(default_factory=list)

    @classmethod
    def of(cls, results: Path, config: Config) -> _Chains:
        """All that a configuration asks for."""
        found = cls()
        captures: dict[tuple[str, str], Chain] = {}
        for name in grid.models(config):
            folder = results / name
            found.models.append((folder / "model.json",))
            for site in grid.stored_sites(config, name):
                captures[name, site] = (*found.models[-1], folder / "capture" / f"{site}.json")
                metrics = folder / "metrics" / f"{site}.parquet"
                found.metrics.append((*captures[name, site], metrics))
        found.captures = list(captures.values())
        timed = timings(config)
        for curve in grid.curves(config):
            captured = found._add(results, config, curve, captures[curve.model, plain(curve.site)])
            if (curve.model, curve.criterion, curve.site) in timed:
                made_from = (*captured, *found.curves[-1])
                found.speed.append((*made_from, results / curve.folder / "speed.parquet"))
        for name, task in grid.truthfulness(config):
            answers = (results / name / "answers" / f"{task}.{end}" for end in ("json", "parquet"))
            output = results / name / "truthfulness" / f"{task}.parquet"
            found.truthfulness.append((results / name / "model.json", *answers, output))
        return found

    def _add(self, results: Path, config: Config, curve: Curve, captured: Chain) -> Chain:
        """A curve, and what is made beside it; returns what is captured, with the curve's calibration."""
        folder = results / curve.folder
        search = (folder / "search.json",) if curve.auto else ()
        model = results / curve.model
        scored = (model / "model.json", model / "dense" / "eval.json")
        if declared(json.loads(grid.criterion_slice(config, curve.criterion)))["calibrated"]:
            captured = (*captured, folder / "calibration.safetensors")
            self.calibrations.append(captured)
        made_from = (*scored, *search, *_nodes(folder, curve))
        self.equals.append((*made_from, folder / "equal_sparsity.parquet"))
        self.curves.append((*self.equals[-1], folder / "curve.json"))
        self.masks.append((*captured, *search, folder / "masks.parquet"))
        self.reuse.append((*self.masks[-1], folder / "prompt_reuse.parquet"))
        self.sparsity.append((*self.reuse[-1], folder / "sparsity.parquet"))
        if curve.sensitivity:
            self.sensitivity.append((*captured, folder / "sensitivity.parquet"))
        return captured

    def damaged(self) -> Iterator[Failure]:
        """Outputs that cannot be read as what they are to be."""
        yield from _damaged(self.models, read_manifest)
        yield from _damaged(self.captures, read_manifest)
        yield from _damaged(self.curves, read_manifest)
        yield from _damaged(self.equals, lambda path: read_parquet(path, EQUAL))
        yield from _damaged(self.calibrations, lambda path: read_calibration(path, "np"))
        yield from _damaged(self.metrics, lambda path: read_parquet(path, *METRICS))
        yield from _damaged(self.masks, lambda path: read_parquet(path, MASKS))
        yield from _damaged(self.reuse, lambda path: read_parquet(path, REUSE))
        yield from _damaged(self.sparsity, lambda path: read_parquet(path, *OUTPUT_ERROR))
        yield from _damaged(self.sensitivity, lambda path: read_parquet(path, *SENSITIVITY))
        yield from _damaged(self.truthfulness, lambda path: read_parquet(path, TRUTHFULNESS))
        yield from _damaged(self.speed, lambda path: read_parquet(path, SPEED))

    def missing(self) -> list[Path]:
        """Outputs that are not there, and what they should have been made from, each once."""
        kinds = (
            *(self.models, self.captures, self.calibrations, self.metrics),
            *(self.curves, self.sparsity, self.sensitivity, self.truthfulness, self.speed),
        )
        every = (path for chains in kinds for chain in chains for path in chain)
        gone = (path for path in every if not path.is_file() and path.name not in BESIDE)
        return list(dict.fromkeys(gone))


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
