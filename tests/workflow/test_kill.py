"""Killed at any moment, the next run does only what is left and ends with the same bytes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from checkout import Checkout, smoke_config
from hooks.forking import Forked

NODE = "zoo-small/topk/intermediate/0.9"
SEARCH = "zoo-small/topp/input"
CAPTURE = "zoo-small/capture/intermediate.json"
STORE = "zoo-small/activations.zarr"
# Forward passes of the longer capture, and of a part of it, of which two are under way.
CAPTURED, PART = 7, 3
MADE = {"capture": [STORE, CAPTURE], "evaluate": [NODE], "search": [SEARCH]}
TARGETS = [f"results/{NODE}/eval.json", f"results/{SEARCH}/search.json", f"results/{CAPTURE}"]


def long_capture() -> dict[str, Any]:
    """A capture in three parts: what is killed in the last must not repeat the first."""
    config = smoke_config()
    config["texts"] = {"long": {"file": "results/long.jsonl"}}
    config["capture"] = {"text": "long", "tokens": CAPTURED * 16 * 256, "sequence_length": 256}
    return config


@pytest.fixture(scope="session")
def undisturbed(smoke: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The smoke run with a longer capture. Leave it as it is."""
    checkout = smoke.copy(tmp_path_factory.mktemp("undisturbed") / "atlas")
    prose = (checkout.path / "workflow/resources/text/prose.jsonl").read_text()
    (checkout.results / "long.jsonl").write_text(2 * prose)
    checkout.run_well(f"results/{CAPTURE}", config=long_capture())
    assert len(checkout.forwards()) == CAPTURED
    return checkout


@pytest.fixture
def unfinished(undisturbed: Checkout, tmp_path: Path) -> Checkout:
    """A copy of that run without a node, a search and the captures."""
    checkout = undisturbed.copy(tmp_path / "atlas")
    for name in (NODE, SEARCH, "zoo-small/capture", STORE):
        shutil.rmtree(checkout.results / name)
    return checkout


def passes(smoke: Checkout) -> dict[str, int]:
    """Forward passes of the node and of the search when nothing disturbs them."""
    counts = Counter(smoke.forwards())
    return {
        "evaluate": counts[f"evaluate {NODE}/eval.json"],
        "search": counts[f"search {SEARCH}/search.json"],
        "capture": CAPTURED,
    }


def assert_same(checkout: Checkout, undisturbed: Checkout, names: list[str]) -> None:
    """These files and folders have the bytes of the undisturbed run."""
    made_later = ("curve.json", "equal_sparsity.parquet", "sparsity.parquet", "masks.parquet")
    made_later += ("prompt_reuse.parquet",)
    asked_for_by_nobody = {f"{SEARCH}/{name}" for name in made_later}
    expected = {
        path: data
        for path, data in undisturbed.contents().items()
        if path.startswith(tuple(names)) and path not in asked_for_by_nobody
    }
    found = checkout.contents()
    assert expected
    assert {path for path in found if path.startswith(tuple(names))} == expected.keys()
    assert [path for path, data in expected.items() if found[path] != data] == []


def test_stages_killed_in_their_middle(
    smoke: Checkout, undisturbed: Checkout, unfinished: Checkout
) -> None:
    whole = passes(smoke)
    node = whole["search"] // 3
    assert whole["evaluate"] >= 3
    # The capture dies in its last part, the node in its second batch, the search in its second node's.
    at = {"capture": CAPTURED, "evaluate": 2, "search": node + 2}
    failed = unfinished.run(
        *TARGETS, config=long_capture(), KILL=",".join(f"{stage}:{n}" for stage, n in at.items())
    )
    assert failed.returncode != 0
    before = Counter(line.split()[0] for line in unfinished.forwards())
    assert before == at
    # The failed jobs keep what they had finished.
    assert list(unfinished.results.glob(f"{NODE}/*.journal"))
    assert len(list(unfinished.results.glob(f"{SEARCH}/*/eval.json"))) == 1
    for target in TARGETS:
        assert not (unfinished.path / target).exists()

    again = Counter(
        line.split()[0] for line in unfinished.run_well(*TARGETS, config=long_capture())
    )
    # The pass that was cut short is done again, and nothing else; of the capture perhaps the part before.
    assert again.pop("capture") in (1, 1 + PART)
    assert again == {stage: whole[stage] - at[stage] + 1 for stage in again}
    assert_same(unfinished, undisturbed, [NODE, SEARCH, STORE, CAPTURE])


def test_everything_killed(smoke: Checkout, undisturbed: Checkout, unfinished: Checkout) -> None:
    whole = passes(smoke)["evaluate"]
    target = TARGETS[0]
    killed = unfinished.run(target, config=long_capture(), KILL="evaluate:2:all", FORK_SERVER="")
    assert killed.returncode == -signal.SIGKILL
    locked = unfinished.run(target, config=long_capture())
    assert locked.returncode != 0
    assert "--unlock" in locked.stdout
    assert unfinished.run("--unlock", config=long_capture()).returncode == 0
    again = unfinished.run_well(target, config=long_capture())
    assert len(again) == whole - 1
    assert_same(unfinished, undisturbed, [NODE])


def test_snakemake_killed_alone(
    smoke: Checkout, undisturbed: Checkout, unfinished: Checkout
) -> None:
    """Its job lives on; the same command, given again at once, waits for it and repeats nothing."""
    whole = passes(smoke)["evaluate"]
    unfinished.plan(config=long_capture())  # writes variant.yaml
    first = unfinished.start(
        *("-m", "snakemake", "--cores", "2", TARGETS[0], "--configfile", "variant.yaml"),
        SLOW="1",
        FORK_SERVER="",
    )
    try:
        wait_for(lambda: unfinished.forwards(), first)
        first.kill()
        first.wait()
        assert unfinished.run("--unlock", config=long_capture()).returncode == 0
        done = unfinished.run(TARGETS[0], config=long_capture())
        assert done.returncode == 0, done.stdout
        assert len(unfinished.forwards()) == whole
        assert_same(unfinished, undisturbed, [NODE])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)


def wait_for(happened: Any, process: Forked, seconds: float = 300) -> None:
    """Wait until `happened()`, as long as the process lives."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.study
@pytest.mark.parametrize("whom", ["", ":all"], ids=["stage", "everything"])
@pytest.mark.parametrize(
    ("stage", "target"), list(zip(["evaluate", "search", "capture"], TARGETS, strict=True))
)
def test_killed_over_and_over(
    smoke: Checkout, undisturbed: Checkout, unfinished: Checkout, stage: str, target: str, whom: str
) -> None:
    """Killed in each run after as little progress as possible, it gets through all the same."""
    # The first part of a capture is recorded for certain when the third has begun.
    limit = 2 * PART + 1 if stage == "capture" else 2
    runs = 0
    killed = True
    while killed and runs <= passes(smoke)[stage]:
        done = unfinished.run(
            target, config=long_capture(), KILL=f"{stage}:{limit}{whom}", FORK_SERVER=""
        )
        killed = done.returncode != 0
        runs += 1
        if killed and whom:
            assert unfinished.run("--unlock", config=long_capture()).returncode == 0
    assert not killed
    assert runs >= 2
    made = {
        "capture": ["zoo-small/activations.zarr", CAPTURE],
        "evaluate": [NODE],
        "search": [SEARCH],
    }
    assert_same(unfinished, undisturbed, made[stage])


@pytest.mark.study
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("stage", "target"), list(zip(["evaluate", "search", "capture"], TARGETS, strict=True))
)
def test_killed_while_a_file_is_put_in_place(
    smoke: Checkout,
    undisturbed: Checkout,
    unfinished: Checkout,
    stage: str,
    target: str,
    number: int,
) -> None:
    """Killed between a temporary file and its rename."""
    killed = unfinished.run(target, config=long_capture(), KILL_WRITE=f"{stage}:{number}")
    before = len(unfinished.forwards())
    again = unfinished.run_well(target, config=long_capture())
    # A node has two files; no third one is put in place.
    assert (killed.returncode == 0) == (stage == "evaluate" and number == 3)
    # What of a capture was not recorded is repeated; an evaluation repeats nothing.
    assert before + len(again) <= passes(smoke)[stage] + (2 * PART if stage == "capture" else 0)
    assert_same(unfinished, undisturbed, MADE[stage])
