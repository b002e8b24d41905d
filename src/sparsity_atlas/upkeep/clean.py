"""Command `clean`: what killed or changed runs left in a results folder, and no result needs.

A file that a manifest names is a result and stays, also of a model that the configuration does not ask
for any more. What the next run would go on with stays, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.gates import gate_table
from sparsity_atlas.evaluation.kept import BESIDE
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.files.whole import abandoned, free, read_manifest
from sparsity_atlas.upkeep import kept_answers

# Seconds. A younger file may be a running job's.
_YOUNG = 3600
# Seconds. Nobody writes one file for so long.
_DAY = 24 * 3600
STORE = "activations.zarr"


@dataclass(frozen=True)
class Orphan:
    """A file or folder that nothing needs, and why."""

    path: Path
    reason: str

    @property
    def size(self) -> int:
        """Bytes."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


def orphans(results: Path, config: Config) -> Iterator[Orphan]:
    """What can go from a results folder.

    Args:
        results: the folder.
        config: of the runs to come; what they would go on with is kept.
    """
    models = set(grid.models(config))
    for store in sorted(results.glob(f"*/{STORE}")):
        if store.parent.name not in models and not _named(store.parent):
            yield Orphan(store, "its model is not asked for, and no manifest names it")
    for journal in sorted(results.glob("*/activations.journal")):
        if not (journal.parent / STORE).is_dir():
            yield Orphan(journal, "its store is gone")
        elif journal.parent.name not in models:
            yield Orphan(journal, "its model is not asked for")
    for folder in sorted({path.parent for path in _node_files(results)}):
        yield from _node_orphans(results, config, folder)
    studied = {curve.folder for curve in grid.curves(config) if curve.sensitivity}
    for journal in sorted(results.glob("*/*/*/sensitivity.journal")):
        if str(journal.parent.relative_to(results)) not in studied:
            yield Orphan(journal, "its study is not asked for")
    for path, reason in kept_answers.left_over(results, config):
        yield Orphan(path, reason)
    for path in sorted(results.rglob(".*.tmp")):
        if _old(path) and abandoned(path, elsewhere=_DAY):
            yield Orphan(path, "its writer is dead")
    for path in sorted(results.rglob("*.partial")):
        if path.is_file() and _old(path):
            yield Orphan(path, "its writer is dead")


def _node_files(results: Path) -> Iterator[Path]:
    yield from results.glob(f"*/dense/{gate_table.NAME}")
    for pattern in ("*/dense", "*/*/*/*"):
        yield from results.glob(f"{pattern}/*.journal")
        yield from results.glob(f"{pattern}/samples.parquet")
        for table in BESIDE.values():
            yield from results.glob(f"{pattern}/{table.NAME}")


def _node_orphans(results: Path, config: Config, folder: Path) -> Iterator[Orphan]:
    asked = asked_tasks(config, folder.relative_to(results))
    samples = folder / "samples.parquet"
    whole = (folder / "eval.json").is_file()
    done: set[str] = set()
    for table in (samples, *(folder / one.NAME for one in BESIDE.values())):
        if table.is_file() and not whole and not asked:
            yield Orphan(table, "its node is not asked for, and no manifest names it")
    gates = folder / gate_table.NAME
    if gates.is_file() and not whole and not any(config.tasks[one].inserted for one in asked):
        yield Orphan(gates, "no text is asked for before its prompts, and no manifest names it")
    if samples.is_file():
        try:
            done = set(read_table(samples)[0]["tasks"])
        except AtlasError:
            done = set()  # a damaged table is the doctor's matter; the journals may mend it
    for journal in sorted(folder.glob("*.journal")):
        if journal.stem not in asked:
            yield Orphan(journal, "its node and task are not asked for")
        elif whole and journal.stem in done:
            yield Orphan(journal, "its task is finished")


def asked_tasks(config: Config, node: Path) -> set[str]:
    """Tasks that a configuration asks of a node, which is given by its path below the results."""
    if node.name == "dense":
        return set(grid.model_tasks(config, node.parts[0]))
    model, criterion, site, level = node.parts
    studied = config.studies.truthfulness
    if studied is not None and f"{criterion}/{site}/{level}" in studied.nodes:
        return set(grid.model_tasks(config, model))
    return {
        task
        for curve in grid.curves(config)
        if (curve.model, curve.criterion, curve.site) == (model, criterion, site)
        if curve.auto or level in curve.levels
        for task in curve.tasks
    }


def _named(model: Path) -> bool:
    """Whether a manifest names a model's store; a damaged one might."""
    for path in model.glob("capture/*.json"):
        try:
            if read_manifest(path)["tensors"]:
                return True
        except AtlasError:
            return True
    return False


def _old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _YOUNG


def remove(orphan: Orphan, results: Path) -> bool:
    """Remove an orphan, and the folders that it leaves empty.

    Returns:
        False if a job holds the folder's lock.
    """
    locks = [orphan.path.parent / ".lock", orphan.path.parent / "activations.lock"]
    locks.append(orphan.path.with_name(f"{kept_answers.task_of(orphan.path)}.lock"))
    with free(locks[0]) as node, free(locks[1]) as store, free(locks[2]) as answers:
        if not (node and store and answers):
            return False
        if orphan.path.is_dir():
            shutil.rmtree(orphan.path)
        else:
            orphan.path.unlink(missing_ok=True)
        folder = orphan.path.parent
        while folder != results and {path for path in folder.iterdir()} <= set(locks):
            for lock in locks:
                lock.unlink(missing_ok=True)
            folder.rmdir()
            folder = folder.parent
            locks = [folder / ".lock", folder / "activations.lock"]
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas clean", description=__doc__)
    parser.add_argument(
        "--config", required=True, type=json.loads, help="JSON: the merged configuration"
    )
    parser.add_argument("--results", required=True, type=Path, help="the results folder")
    parser.add_argument("--remove", action="store_true", help="remove what is listed")
    arguments = parser.parse_args()

    found = list(orphans(arguments.results, parse(arguments.config)))
    lines = [f"{one.size / 2**20:10.1f} MiB  {one.path}: {one.reason}" for one in found]
    total = f"{sum(one.size for one in found) / 2**20:10.1f} MiB in {len(found)} files and folders"
    sys.stdout.write("\n".join([*lines, f"{total} that nothing needs", ""]))
    if not arguments.remove:
        if found:
            sys.stdout.write("Nothing was removed; `--config remove=true` removes them.\n")
        return
    kept = [one for one in found if not remove(one, arguments.results)]
    for one in kept:
        sys.stdout.write(f"kept: {one.path}: a job is using its folder\n")
    sys.stdout.write(f"Removed {len(found) - len(kept)}.\n")
