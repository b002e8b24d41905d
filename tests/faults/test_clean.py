"""What `clean` lists and removes, and that no result and no unfinished work is among it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from checkout import Checkout
from faults import pipeline
from sparsity_atlas.files.whole import locked, machine

NODE = "tiny/topk/intermediate/0.5"


def clean(
    checkout: Checkout, *arguments: str, config: dict[str, Any] | None = None
) -> tuple[set[str], str]:
    """Run it; the paths below results/ that it lists, and all that it says."""
    config = config or pipeline.configuration()
    full = {"criteria": {"topp": {}, "topk": {}}, **config}
    done = checkout.stage("clean", "--results", "results", "--config", json.dumps(full), *arguments)
    assert done.returncode == 0, done.stderr
    listed = [line.split("MiB  ")[1] for line in done.stdout.splitlines() if "MiB  " in line]
    return {line.split(": ")[0].removeprefix("results/") for line in listed}, done.stdout


def old(path: Path, content: bytes = b"x") -> Path:
    """A file of yesterday."""
    path.write_bytes(content)
    os.utime(path, (1, 1))
    return path


@pytest.fixture
def orphaned(spoilt: Checkout) -> tuple[Checkout, set[str]]:
    """A run with what killed and changed runs leave, and its paths."""
    results = spoilt.results
    node = results / NODE
    other = results / "gone/topk/intermediate/0.5"
    shutil.copytree(results / "tiny/activations.zarr", results / "gone/activations.zarr")
    other.mkdir(parents=True)
    shutil.copy(node / "samples.parquet", other)
    (results / "no/dense").mkdir(parents=True)
    made = [
        other / "choice.journal",  # of a model that is not asked for
        node / "forgotten.journal",  # of a task that is not asked for
        node / "choice.journal",  # its task stands in the table
        results / "no/dense/choice.journal",
        results / "no/dense/gates.parquet",
        results / "no/activations.journal",  # without a store
        node / f".eval.json.4194304@{machine()}.tmp",  # of a dead process
        node / ".eval.json.1@elsewhere.tmp",  # of another machine, long ago
        results / "tiny/activations.zarr/input/x.partial",
    ]
    for path in made:
        old(path)
    paths = {str(path.relative_to(results)) for path in made}
    return spoilt, paths | {"gone/activations.zarr", "gone/topk/intermediate/0.5/samples.parquet"}


def test_a_finished_run_has_no_orphans(whole: Checkout) -> None:
    listed, text = clean(whole)
    assert listed == set()
    assert "0.0 MiB in 0 files" in text
    # Nor has one whose configuration does not ask for it any more: manifests name its files.
    config = pipeline.configuration()
    config["models"]["other"] = {"path": "models/tiny"}
    for block in config["run"]:
        block["models"] = ["other"]
    assert clean(whole, config=config)[0] == set()


def test_orphans_are_listed_and_then_removed(
    orphaned: tuple[Checkout, set[str]], whole: Checkout
) -> None:
    checkout, paths = orphaned
    before = checkout.times()
    listed, text = clean(checkout)
    assert listed == paths
    assert "Nothing was removed" in text
    assert checkout.times() == before
    listed, text = clean(checkout, "--remove")
    assert listed == paths
    assert f"Removed {len(paths)}." in text
    assert clean(checkout)[0] == set()
    assert checkout.contents() == whole.contents()
    assert not (checkout.results / "gone").exists()
    assert not (checkout.results / "no").exists()


def test_what_the_next_run_goes_on_with_is_kept(spoilt: Checkout) -> None:
    results = spoilt.results
    for path in (results / NODE / "eval.json", *results.glob("tiny/capture/*.json")):
        path.unlink()
    (results / "tiny/activations.journal").write_bytes(b"x")
    (results / NODE / "choice.journal").write_bytes(b"x")
    # A level of a search, which may be any; a temporary file of a living process, and a fresh one.
    level = results / "tiny/topp/intermediate/0.123"
    level.mkdir()
    (level / "choice.journal").write_bytes(b"x")
    old(results / NODE / f".eval.json.{os.getpid()}@{machine()}.tmp")
    (results / NODE / f".samples.parquet.4194304@{machine()}.tmp").write_bytes(b"x")
    # Of a process that another machine has and this one has not.
    elsewhere = old(results / NODE / ".eval.json.4194304@elsewhere.tmp")
    os.utime(elsewhere, (time.time() - 7200,) * 2)
    assert clean(spoilt, "--remove")[0] == set()


def test_a_folder_in_use_is_left_alone(orphaned: tuple[Checkout, set[str]]) -> None:
    checkout, paths = orphaned
    with locked(checkout.results / NODE / ".lock"):
        _, text = clean(checkout, "--remove")
    kept = {line.split(": ")[1] for line in text.splitlines() if line.startswith("kept: ")}
    assert kept == {f"results/{path}" for path in paths if path.startswith(NODE)}
    assert all((checkout.path / path).exists() for path in kept)


@pytest.mark.parametrize("arguments", [(), ("--config", "remove=true")], ids=["list", "remove"])
def test_the_target(orphaned: tuple[Checkout, set[str]], arguments: tuple[str, ...]) -> None:
    checkout, paths = orphaned
    done = checkout.run("clean", *arguments, config=pipeline.configuration())
    assert done.returncode == 0, done.stdout
    assert all(path in done.stdout for path in paths)
    assert ("Nothing was removed" in done.stdout) == (not arguments)
    assert all((checkout.results / path).exists() == (not arguments) for path in paths)
