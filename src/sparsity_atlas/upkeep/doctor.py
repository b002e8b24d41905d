"""Command `doctor`: compares every store, table and journal of a results folder with its manifest.

Nothing is changed. What is damaged is listed with what to delete and which targets to run again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsity_atlas.activations import metrics
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.curves import equal_sparsity
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.gates import gate_table
from sparsity_atlas.evaluation.kept import BESIDE
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.files.journal import whole_lines
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.files.whole import free, read_manifest
from sparsity_atlas.speed import speed_table
from sparsity_atlas.studies import mask_table, output_error, prompt_table, sensitivity
from sparsity_atlas.truthfulness import truth_table
from sparsity_atlas.upkeep import kept_answers

STORE = "activations.zarr"


@dataclass(frozen=True)
class Finding:
    """What was found at a path.

    problem: what is wrong with it; empty if it is sound.
    delete: what must go before a run makes it anew.
    again: targets of that run.
    note: what is worth knowing, of a sound one.
    """

    path: Path
    problem: str = ""
    delete: tuple[Path, ...] = ()
    again: tuple[Path, ...] = ()
    note: str = ""


def examine(results: Path) -> Iterator[Finding]:
    """Look at everything in a results folder that a manifest vouches for.

    Raises:
        AtlasError: there is no such folder.
    """
    if not results.is_dir():
        raise AtlasError(f"{results}: no such folder")
    for path in sorted(results.glob("*/model.json")):
        yield _file(path, read_manifest)
    for model in sorted({path.parent for path in results.glob(f"*/{STORE}")}):
        yield from _capture(model)
    for path in sorted(results.glob("*/capture/*.json")):
        if not (path.parents[1] / STORE).is_dir():
            yield Finding(path, f"{STORE} is not there", (path,), (path,))
    for path in sorted(results.glob("*/answers/*.json")):
        yield _answers(path)
    for path in kept_answers.journals(results):
        yield _journal(path)
    for path in sorted(results.glob("*/truthfulness/*.parquet")):
        yield _file(path, partial(_table, (truth_table.SCHEMA,)))
    for path in sorted(results.glob("*/metrics/*.parquet")):
        yield _file(path, lambda one: read_parquet(one, *metrics.SCHEMAS))
    for pattern in ("*/dense", "*/*/*/*"):
        nodes = {path.parent for path in results.glob(f"{pattern}/eval.json")}
        nodes |= {path.parent for path in results.glob(f"{pattern}/samples.parquet")}
        for table in BESIDE.values():
            nodes |= {path.parent for path in results.glob(f"{pattern}/{table.NAME}")}
        nodes |= {path.parent for path in results.glob(f"{pattern}/*.journal")}
        for node in sorted(nodes):
            yield from _node(node)
    for path in sorted(results.glob(f"*/dense/{gate_table.NAME}")):
        yield _file(path, gate_table.read_table)
    for name in ("search.json", "curve.json"):
        for path in sorted(results.glob(f"*/*/*/{name}")):
            yield _file(path, read_manifest)
    for name, schemas in (
        ("sparsity", output_error.SCHEMAS),
        ("masks", (mask_table.SCHEMA,)),
        ("prompt_reuse", (prompt_table.SCHEMA,)),
        ("sensitivity", sensitivity.SCHEMAS),
        ("speed", (speed_table.SCHEMA,)),
        ("equal_sparsity", (equal_sparsity.SCHEMA,)),
    ):
        for path in sorted(results.glob(f"*/*/*/{name}.parquet")):
            yield _file(path, partial(_table, schemas))
    for path in sorted(results.glob("*/*/*/calibration.safetensors")):
        yield _file(path, partial(read_calibration, framework="np"))
    figures = ("figures/*.svg", "figures/*.png")
    for pattern in ("*.csv", "*.html", "*.yaml", "*/summary.csv", *figures):
        for path in sorted(results.glob(pattern)):
            # They have no checksum, but are never empty.
            if path.stat().st_size == 0:
                yield Finding(path, "empty", (path,), (path,))


def _file(path: Path, read: Callable[[Path], Any]) -> Finding:
    try:
        read(path)
    except AtlasError as error:
        return Finding(path, _about(path, error), (path,), (path,))
    return Finding(path)


def _table(schemas: tuple[pa.Schema, ...], path: Path) -> pa.Table:
    return read_parquet(path, *schemas)


def _about(path: Path, error: AtlasError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _capture(model: Path) -> Iterator[Finding]:
    """A model's store, and the manifests of its sites."""
    path = model / STORE
    manifests = tuple(sorted(model.glob("capture/*.json")))
    with free(path.with_suffix(".lock")) as idle:
        if not idle:
            yield Finding(path, note="in use, not looked at")
            return
        journal = path.with_suffix(".journal")
        if journal.is_file():
            yield _journal(journal)
        problems = []
        checked: set[str] = set()
        for manifest in manifests:
            try:
                tensors = read_manifest(manifest)["tensors"]
                store = ActivationStore(path)
                store.ids()
                for name in tensors.keys() - checked:
                    store.check(name)
                    checked.add(name)
                    if store.complete(name) != tensors[name]:
                        raise AtlasError(f"'{name}' is not what {manifest} says")
            except AtlasError as error:
                problems.append(_about(path, error))
    if problems:
        unique = "; ".join(dict.fromkeys(problems))
        yield Finding(path, unique, (path, model / "capture"), manifests)
    else:
        note = "" if manifests else "no manifest names it (unfinished, or left over: see clean)"
        yield Finding(path, note=note)


def _answers(manifest: Path) -> Finding:
    """A task's answers: manifest, samples and store."""
    problem = kept_answers.problem(manifest)
    if problem is None:
        return Finding(manifest, note="in use, not looked at")
    files = (manifest, *(manifest.with_suffix(end) for end in (".parquet", kept_answers.STORE)))
    delete = tuple(path for path in files if path.exists())
    return Finding(manifest, problem, delete if problem else (), (manifest,) if problem else ())


def _node(folder: Path) -> Iterator[Finding]:
    """A node's tables and journals, and what its eval.json says of them."""
    result, samples = folder / "eval.json", folder / "samples.parquet"
    counts = {name: folder / table.NAME for name, table in BESIDE.items()}
    with free(folder / ".lock") as idle:
        if not idle:
            yield Finding(folder, note="in use, not looked at")
            return
        for journal in sorted(folder.glob("*.journal")):
            yield _journal(journal)
        try:
            manifest = read_manifest(result) if result.is_file() else None
            header, table = read_table(samples) if samples.is_file() else ({"tasks": {}}, None)
            counted = {
                name: BESIDE[name].read_table(path).tasks if path.is_file() else {}
                for name, path in counts.items()
            }
        except AtlasError as error:
            every = (result, samples, *counts.values())
            files = tuple(path for path in every if path.is_file())
            yield Finding(folder, str(error).removeprefix(f"{folder}/"), files, (result,))
            return
    if manifest is None:
        note = f"unfinished; done: {', '.join(header['tasks']) or 'no task'}"
        yield Finding(folder, note=note)
        return
    rows = set(table["task"].to_pylist()) if table is not None else set()
    for task, fingerprint in manifest["fingerprints"].items():
        kept = header["tasks"].get(task)
        outcome = manifest["tasks"][task]
        if kept != {"fingerprint": fingerprint, "result": outcome}:
            problem = f"samples.parquet has not the '{task}' that eval.json tells of"
        elif outcome["status"] == "ok" and task not in rows:
            problem = f"samples.parquet has no sample of '{task}'"
        elif lacking := [
            path.name
            for name, path in counts.items()
            if name in manifest and counted[name].get(task) != fingerprint
        ]:
            problem = f"{lacking[0]} has not the '{task}' that eval.json tells of"
        else:
            continue
        yield Finding(folder, problem, (result,), (result,))
        return
    yield Finding(folder)


def _journal(path: Path) -> Finding:
    """A journal never is damage: what cannot be read of it is computed again."""
    lines = whole_lines(path)
    lost = path.stat().st_size - (lines[-1][1] if lines else 0)
    note = f"unfinished work, goes on after {max(len(lines) - 1, 0)} records"
    if lost:
        note += f"; the last {lost:,} bytes are cut or damaged, and will be computed again"
    return Finding(path, note=note)


def prescription(findings: list[Finding]) -> str:
    """The commands that mend what was found."""
    delete = dict.fromkeys(path for one in findings for path in one.delete)
    again = dict.fromkeys(path for one in findings for path in one.again)
    return f"rm -r {shlex.join(map(str, delete))}\nsnakemake --cores all {shlex.join(map(str, again))}\n"


def main() -> None:
    """Command line; the exit code is 1 if anything is damaged."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas doctor", description=__doc__)
    parser.add_argument("--results", required=True, type=Path, help="the results folder")
    arguments = parser.parse_args()

    findings = list(examine(arguments.results))
    damaged = [one for one in findings if one.problem]
    for one in findings:
        if one.problem or one.note:
            kind = "damaged" if one.problem else "note"
            sys.stdout.write(f"{kind}: {one.path}: {one.problem or one.note}\n")
    sys.stdout.write(f"{len(findings)} looked at, {len(damaged)} damaged\n")
    if damaged:
        sys.stdout.write(f"To mend it:\n{prescription(damaged)}")
        raise SystemExit(1)
