"""Answers that `studies.truthfulness` captured: are they as they were written, and what is left over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.files.whole import free, read_manifest
from sparsity_atlas.truthfulness import own_answers

FOLDER, STORE = "answers", ".zarr"


def stores(results: Path) -> list[Path]:
    """Stores of last tokens' vectors."""
    return sorted(results.glob(f"*/{FOLDER}/*{STORE}"))


def journals(results: Path) -> list[Path]:
    """Journals of captures that have not ended."""
    return sorted(results.glob(f"*/{FOLDER}/*.journal"))


def task_of(path: Path) -> str:
    """The task that a store or a journal is of; no task's name ends like either."""
    return path.name.removesuffix(".journal").removesuffix(STORE)


def problem(manifest: Path) -> str | None:
    """What is wrong with some answers, of which the manifest, samples and store must agree.

    Returns:
        Empty where they are sound; None where a job is at work on them.
    """
    store = manifest.with_suffix(STORE)
    with free(manifest.with_suffix(".lock")) as idle:
        if not idle:
            return None
        try:
            told = read_manifest(manifest)
            rows = len(read_parquet(manifest.with_suffix(".parquet"), own_answers.SCHEMA))
            if rows != told.get("samples", 0):
                raise AtlasError(f"{rows} samples, where {told['samples']} were captured")
            for name, record in told["tensors"].items():
                opened = ActivationStore(store)
                opened.check(name)
                if opened.complete(name) != record:
                    raise AtlasError(f"{store}: '{name}' is not what {manifest} says")
        except AtlasError as error:
            return str(error).removeprefix(f"{manifest}: ")
    return ""


def left_over(results: Path, config: Config) -> Iterator[tuple[Path, str]]:
    """Stores and journals that no manifest names and no run would go on with, and why they can go."""
    asked = set(grid.truthfulness(config))
    for path in (*stores(results), *journals(results)):
        task = task_of(path)
        finished = path.with_name(f"{task}.json").is_file()
        if path.suffix == ".journal" and finished:
            yield path, "its answers are captured"
        elif not finished and (path.parents[1].name, task) not in asked:
            yield path, "its answers are not asked for"
