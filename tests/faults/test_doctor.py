"""What the doctor finds, what it says must be done, and that doing it makes the results whole again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkout import Checkout
from faults import pipeline
from sparsity_atlas.files.whole import locked
from sparsity_atlas.upkeep.doctor import examine

NODE = "tiny/topk/intermediate/0.5"


def doctor(checkout: Checkout, code: int) -> list[str]:
    """The lines of a report, which must end with this code."""
    done = checkout.stage("doctor", "--results", "results")
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def flip(path: Path, place: float = 0.5) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def chunk(results: Path) -> Path:
    """A chunk of the store that holds activations."""
    return max((results / "tiny/activations.zarr/experts.input/layer_001/c").rglob("0"), key=str)


# What is done, and the words that the doctor has for it.
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "chunk flipped": (
        lambda r: flip(chunk(r)),
        "activations.zarr: 'experts.input', layer 1|activations",
    ),
    "chunk gone": (lambda r: chunk(r).unlink(), "activations.zarr: 'experts.input', layer 1"),
    "chunk truncated": (
        lambda r: chunk(r).write_bytes(chunk(r).read_bytes()[:20]),
        "activations.zarr: damaged activation store|activations.zarr: 'experts.input', layer 1",
    ),
    "token ids gone": (
        lambda r: shutil.rmtree(r / "tiny/activations.zarr/text/ids/c"),
        "activations.zarr: damaged activation store",
    ),
    "store gone": (
        lambda r: shutil.rmtree(r / "tiny/activations.zarr"),
        "intermediate.json: activations.zarr is not there",
    ),
    "samples flipped": (lambda r: flip(r / NODE / "samples.parquet"), f"{NODE}: samples.parquet"),
    "experts flipped": (lambda r: flip(r / NODE / "experts.parquet"), f"{NODE}: experts.parquet"),
    "experts gone": (
        lambda r: (r / NODE / "experts.parquet").unlink(),
        f"{NODE}: experts.parquet has not the 'choice'",
    ),
    "samples gone": (
        lambda r: (r / NODE / "samples.parquet").unlink(),
        f"{NODE}: samples.parquet has not the 'choice'",
    ),
    "samples of another node": (
        lambda r: shutil.copy(r / "tiny/dense/samples.parquet", r / NODE),
        f"{NODE}: samples.parquet has not the 'choice'",
    ),
    "result flipped": (lambda r: flip(r / NODE / "eval.json"), f"{NODE}: eval.json: damaged"),
    "model": (lambda r: flip(r / "tiny/model.json"), "model.json: damaged manifest"),
    "search": (lambda r: flip(r / "tiny/topp/intermediate/search.json"), "search.json: damaged"),
    "curve": (lambda r: flip(r / "tiny/topk/intermediate/curve.json"), "curve.json: damaged"),
    "metrics": (lambda r: flip(r / "tiny/metrics/intermediate.parquet"), "parquet: damaged table"),
    "figure": (lambda r: os.truncate(next((r / "figures").iterdir()), 0), "figures/|empty"),
    "comparison": (
        lambda r: flip(r / "tiny/topk/intermediate/equal_sparsity.parquet"),
        "equal_sparsity.parquet: damaged table",
    ),
    "sparsity": (
        lambda r: flip(r / "tiny/topk/intermediate/sparsity.parquet"),
        "sparsity.parquet: damaged table",
    ),
}


def test_a_sound_run(whole: Checkout) -> None:
    before = whole.times()
    lines = doctor(whole, 0)
    assert lines[-1].endswith(" looked at, 0 damaged")
    assert int(lines[-1].split()[0]) > 10
    assert whole.times() == before


@pytest.mark.parametrize("name", SPOILT)
def test_damage_is_named(spoilt: Checkout, name: str) -> None:
    damage, words = SPOILT[name]
    damage(spoilt.results)
    found = [one for one in examine(spoilt.results) if one.problem]
    assert len(found) == 1
    told = f"{found[0].path}: {found[0].problem}"
    assert any(word in told for word in words.split("|")), told
    assert found[0].again


def test_what_the_doctor_prescribes_mends_it(spoilt: Checkout, whole: Checkout) -> None:
    """Every result has its bytes again, of a run that was damaged in several places."""
    names = ["chunk flipped", "samples of another node", "model", "search", "curve", "sparsity"]
    for name in names:
        SPOILT[name][0](spoilt.results)
    lines = doctor(spoilt, 1)
    assert len([line for line in lines if line.startswith("damaged: ")]) == len(names)
    removal, command = lines[-2:]
    subprocess.run(["bash", "-c", removal], cwd=spoilt.path, check=True)
    targets = command.removeprefix("snakemake --cores all ").split()
    for job in pipeline.seconds(whole):
        if set(job.outputs) & set(targets):
            assert pipeline.run(spoilt, job) == 0, pipeline.log_of(spoilt, job)
    assert all((spoilt.path / target).is_file() for target in targets), targets
    doctor(spoilt, 0)
    assert spoilt.contents() == whole.contents()


def test_unfinished_work_is_no_damage(spoilt: Checkout) -> None:
    """A journal cut in a record, a node without its manifest, a file being written, a folder in use."""
    node = spoilt.results / NODE
    (node / "eval.json").unlink()
    (node / "choice.journal").write_bytes(b"0badc0de {}\n")
    (spoilt.results / "figures/.tasks.svg.4194304@elsewhere.tmp").touch()
    used = spoilt.results / "tiny/dense"
    with locked(used / ".lock"):
        lines = doctor(spoilt, 0)
    assert any("choice.journal: unfinished work" in line for line in lines)
    assert any("the last 12 bytes are cut or damaged" in line for line in lines)
    assert any(f"{NODE}: unfinished; done: choice" in line for line in lines)
    assert any("tiny/dense: in use" in line for line in lines)


def test_no_such_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsity_atlas", "doctor", "--results", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/none: no such folder\n"
