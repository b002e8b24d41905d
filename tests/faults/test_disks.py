"""A disk that is full, too small, read-only, or that gives back other bytes than it was given."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkout import Checkout
from faults import pipeline
from faults.test_doctor import flip
from faults.test_kills import products
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.upkeep.doctor import examine

PAGE = 4096


@dataclass
class Disk:
    """A file system of its own, in memory, for the results of a working copy."""

    path: Path

    def remount(self, options: str) -> None:
        """Change its size, or whether it can be written."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    @contextlib.contextmanager
    def leaving(self, pages: int) -> Iterator[None]:
        """Have so many pages left, until the end."""
        filler = self.path / "filler"
        free = os.statvfs(self.path).f_bavail
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (free - pages) * PAGE)
        try:
            yield
        finally:
            filler.unlink()


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    """A small disk at `path`. Only root can mount one; there is no other real one to be had."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], check=True)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture(scope="module")
def copied(
    whole: Checkout, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Checkout, Disk]]:
    """A copy of the finished run, whose results are on a small disk and whose logs are elsewhere."""
    folder = tmp_path_factory.mktemp("disk")
    checkout = pipeline.copy(whole, folder / "atlas")
    checkout.results.rename(folder / "results")
    with mounted(checkout.results) as disk:
        shutil.copytree(folder / "results", checkout.results, dirs_exist_ok=True)
        shutil.move(checkout.results / "logs", folder / "logs")
        (checkout.results / "logs").symlink_to(folder / "logs")
        yield checkout, disk


RULES = ["run_config", "model", "capture", "metrics", "dense", "evaluate", "search", "output_error"]
RULES += ["sensitivity", "curve", "model_summary", "tables", "figures", "page"]


def pages(path: Path) -> int:
    """Pages that a file or the files of a folder take."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(-(-file.stat().st_size // PAGE) for file in files if file.is_file())


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "capture"])
def test_a_disk_that_is_full(copied: tuple[Checkout, Disk], whole: Checkout, rule: str) -> None:
    """One line, nothing that looks whole, and with more room the bytes of an undisturbed run."""
    checkout, disk = copied
    job = pipeline.job_of(whole, rule)
    made = products(checkout, job)
    needed = sum(pages(path) for path in made)
    for path in made:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with disk.leaving(random.Random(rule).randrange(needed)):
        assert pipeline.run(checkout, job) == 1
    assert "no space is left on the disk" in pipeline.error_of(checkout, job)
    assert not list(checkout.results.rglob(".*.tmp"))
    assert not all((checkout.path / output).exists() for output in job.outputs)
    assert [one for one in examine(checkout.results) if one.problem] == []
    assert pipeline.run(checkout, job) == 0
    assert checkout.contents() == whole.contents()


def test_a_disk_that_fills_up_during_a_capture(
    copied: tuple[Checkout, Disk], whole: Checkout
) -> None:
    """It had room when the capture began. What was captured stays, and is not captured again."""
    checkout, disk = copied
    job = pipeline.job_of(whole, "capture")
    for path in products(checkout, job):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkout.forget_forwards()
    process = pipeline.start(checkout, job, SLOW="0.5")
    while not checkout.forwards():
        assert process.poll() is None
        time.sleep(0.02)
    with disk.leaving(1):
        assert process.wait(timeout=300) == 1
    assert "no space is left on the disk" in pipeline.error_of(checkout, job)
    assert pipeline.run(checkout, job) == 0
    assert checkout.contents() == whole.contents()


def test_a_disk_that_cannot_hold_the_store(copied: tuple[Checkout, Disk], whole: Checkout) -> None:
    """Refused before the first pass; nothing is begun."""
    checkout, disk = copied
    job = pipeline.job_of(whole, "capture")
    with _without(products(checkout, job), checkout.path / "away"):
        before = checkout.contents()
        checkout.forget_forwards()
        with disk.leaving(10):
            assert pipeline.run(checkout, job) == 1
        error = pipeline.error_of(checkout, job)
        assert "GiB are free; capture fewer tokens (capture.tokens) or make room" in error
        assert checkout.forwards() == []
        assert checkout.contents() == before


@contextlib.contextmanager
def _without(paths: list[Path], away: Path) -> Iterator[None]:
    away.mkdir()
    for number, path in enumerate(paths):
        shutil.move(path, away / str(number))
    try:
        yield
    finally:
        for number, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(away / str(number), path)
        away.rmdir()


def test_results_that_cannot_be_written(copied: tuple[Checkout, Disk], whole: Checkout) -> None:
    """Each stage ends in one line; Snakemake ends, and nothing has changed."""
    checkout, disk = copied
    before = checkout.contents()
    disk.remount("ro")
    try:
        for rule in ("run_config", "model", "evaluate", "tables"):
            job = pipeline.job_of(whole, rule)
            assert pipeline.run(checkout, job) == 1
            assert "the file system is read-only" in pipeline.error_of(checkout, job)
        done = checkout.run(
            "--forceall", "results/run_config.yaml", config=pipeline.configuration()
        )
        assert done.returncode != 0
        assert "Write-protected output files" in done.stdout
    finally:
        disk.remount("rw")
    assert checkout.contents() == before


# Files that changed behind our back


@pytest.mark.parametrize(
    ("rule", "tensor"), [("metrics", "intermediate"), ("output_error", "input")]
)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_damaged_activations_are_not_measured(
    spoilt: Checkout, whole: Checkout, rule: str, tensor: str, damage: str
) -> None:
    """The stage that reads them says what to delete."""
    chunks = spoilt.results / f"tiny/activations.zarr/{tensor}/layer_000/c"
    path = max(chunks.rglob("0"), key=str)
    match damage:
        case "flipped":
            flip(path)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-7])
        case _:
            path.unlink()
    job = pipeline.job_of(whole, rule)
    assert pipeline.run(spoilt, job) == 1
    error = pipeline.error_of(spoilt, job)
    assert "results/tiny/activations.zarr: " in error
    assert "and run again" in error


def test_a_manifest_of_a_newer_release(spoilt: Checkout, whole: Checkout) -> None:
    path = spoilt.results / "tiny/model.json"
    write_manifest(path, {**read_manifest(path), "format": 2})
    job = pipeline.job_of(whole, "dense")
    assert pipeline.run(spoilt, job) == 1
    error = pipeline.error_of(spoilt, job)
    assert "model.json: format 2 is newer than this release reads (1); update" in error


def test_a_journal_cut_in_a_record(spoilt: Checkout, whole: Checkout) -> None:
    """What is whole of it is used; the rest is computed again."""
    job = pipeline.job_of(whole, "dense")
    passes = _passes(spoilt, whole, job)
    node = spoilt.results / "tiny/dense"
    shutil.rmtree(node)
    assert pipeline.run(spoilt, job, KILL=f"evaluate:{passes}") != 0
    (journal,) = node.glob("*.journal")
    content = journal.read_bytes()
    journal.write_bytes(content[:-20])
    records = content.count(b"\n") - 2  # without the header, and the one that was cut
    assert records > 0
    spoilt.forget_forwards()
    assert pipeline.run(spoilt, job) == 0
    assert len(spoilt.forwards()) == passes - records
    assert spoilt.contents() == whole.contents()


def _passes(spoilt: Checkout, whole: Checkout, job: pipeline.Job) -> int:
    """Forward passes of a job that nothing disturbs, where the cache knows what the model does right."""
    for _ in range(2):
        for path in products(spoilt, job):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        spoilt.forget_forwards()
        assert pipeline.run(spoilt, job) == 0
    return len(spoilt.forwards())


def test_damage_behind_a_run_is_in_its_report(spoilt: Checkout) -> None:
    """One node whose table is damaged: the others' results and the report are there, and list it."""
    flip(spoilt.results / "tiny/topk/intermediate/0.5/samples.parquet")
    (spoilt.results / "tiny/topk/intermediate/0.5/eval.json").unlink()
    config = pipeline.configuration()
    done = spoilt.run(config=config)
    assert done.returncode == 1
    page = (spoilt.results / "index.html").read_text()
    assert "This run did not finish" in page
    assert "tiny/topk/intermediate/0.5/eval.json" in page
    assert "damaged table" in page
    assert "1 of 2 curves" in " ".join(page.split())
    rows = json.loads((spoilt.results / "tiny/topp/intermediate/curve.json").read_text())
    assert rows["points"]
