"""Requests that other processes build ahead: the same results, whatever becomes of these processes."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from lm_eval.api.task import Task

from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.evaluation import ahead, evaluate, session
from sparsity_atlas.evaluation.ahead import Ahead, builders
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.lm import forest
from sparsity_atlas.tasks import prepared, request_cache
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and two builders whatever the device."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(ahead.BUILDERS, "2")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks whose requests this process builds, and `arranged` for those that it puts into batches."""
    found: list[str] = []
    build, pack = Task.build_all_requests, forest.pack

    def building(self: Task, **options: Any) -> None:
        found.append(self.task_name)
        build(self, **options)

    def packing(requests: list[forest.Request], *arguments: Any, **options: Any) -> Any:
        if len(requests) > 10:  # proofs of sharing arrange a few of their own
            found.append("arranged")
        return pack(requests, *arguments, **options)

    monkeypatch.setattr(Task, "build_all_requests", building)
    monkeypatch.setattr(forest, "pack", packing)
    return found


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """One task of each kind."""
    folder = tmp_path / "tasks"
    return {
        "choice": write_task(folder, "choice", choice_documents(), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(), **ROLLING),
        "last": write_task(folder, "last", rolling_documents(12, 3), **LAST_WORD),
        "words": write_task(folder, "words", rolling_documents(5, 4), **GENERATION),
    }


def bytes_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("eval.json", "samples.parquet")]


def test_a_session_finds_what_was_built_and_its_results_are_the_same_bytes(
    manifest: Path,
    tasks: dict,
    built: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate_node(open_session(manifest, tasks), None, tmp_path / "ahead")
    assert built == []
    monkeypatch.setenv(ahead.BUILDERS, "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    evaluate_node(open_session(manifest, tasks), None, tmp_path / "plain")
    assert set(built) == {*tasks, "arranged"}
    assert bytes_of(tmp_path / "ahead") == bytes_of(tmp_path / "plain")
    kept = [
        sorted(path.name for path in tmp_path.glob(f"{one}/*/*/*")) for one in ("cache", "another")
    ]
    assert kept[0] == kept[1]


def test_the_tokenizer_is_read_once_and_by_a_builder(
    manifest: Path, tasks: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = open_session(manifest, tasks)
    own.prepared("choice")
    told = request_cache.tokenizer_digest(own.lm.tokenizer)
    assert told == request_cache._tokenizer_digest(own.lm.tokenizer)
    other = open_session(manifest, tasks)
    monkeypatch.setattr(request_cache, "_tokenizer_digest", None)
    other.prepared("choice")
    assert request_cache.tokenizer_digest(other.lm.tokenizer) == told


def test_a_builder_that_is_killed_is_done_without(
    manifest: Path, tasks: dict, built: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("sparsity_atlas.tasks.prepared.build_ahead", killed)
        evaluate_node(open_session(manifest, tasks), None, tmp_path / "killed")
    assert set(built) == {*tasks, "arranged"}
    evaluate_node(open_session(manifest, tasks), None, tmp_path / "whole")
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_a_builder_that_waits_for_ever_is_given_up(
    manifest: Path, tasks: dict, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "STALLED", 0.1)
    monkeypatch.setattr(
        "sparsity_atlas.tasks.prepared.build_ahead", lambda *_, **__: time.sleep(600)
    )
    own = open_session(manifest, tasks)
    own.prepared("choice")
    assert built == ["choice", "arranged"]


def test_a_task_that_fails_says_so_once_and_as_without_them(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = {**CHOICE, "doc_to_text": "{{question.nothing.at_all}}"}
    entries = {"broken": write_task(tmp_path / "tasks", "broken", choice_documents(), **broken)}
    said = []
    for count in ("1", "0"):
        monkeypatch.setenv(ahead.BUILDERS, count)
        own = open_session(manifest, entries)
        caplog.clear()
        with caplog.at_level(logging.INFO), pytest.raises(TaskFailure) as failure:
            own.prepared("broken")
        said.append((str(failure.value), caplog.messages))
    assert said[0] == said[1]
    assert "undefined" in said[0][0]


def test_what_a_builder_has_to_say_is_said_by_the_session(
    manifest: Path, tasks: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def talking(_: Any, task: Any, **__: Any) -> None:
        ahead.cli.logger.info("of %s", task.name)

    monkeypatch.setattr("sparsity_atlas.tasks.prepared.build_ahead", talking)
    with caplog.at_level(logging.INFO, ahead.cli.logger.name):
        own = open_session(manifest, tasks)
        own.prepared("pages")
        own.prepared("pages")
    said = [one.getMessage() for one in caplog.records if one.name == ahead.cli.logger.name]
    assert said == ["of pages"]


def test_one_that_is_killed_takes_no_other_with_it(
    manifest: Path, tasks: dict, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = prepared.build_ahead

    def some(lm: Any, task: Any, **options: Any) -> None:
        if task.name == "pages":
            os.kill(os.getpid(), signal.SIGKILL)
        original(lm, task, **options)

    monkeypatch.setattr(prepared, "build_ahead", some)
    own = open_session(manifest, tasks)
    for name in tasks:
        own.prepared(name)
    assert [name for name in built if name != "arranged"] == ["pages", "words"]


def test_what_is_ready_is_run_before_what_is_still_built(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns the GPU waited for the largest task while three others were ready."""
    original, run = prepared.build_ahead, evaluate.run_task
    go = tmp_path / "go"

    def slow(lm: Any, task: Any, **options: Any) -> None:
        while task.name == "choice" and not go.exists():
            time.sleep(0.01)
        original(lm, task, **options)

    order = []

    def noting(session: Any, node: Any, name: str, *arguments: Any) -> Any:
        order.append(name)
        if len(order) == 2:
            go.touch()
        return run(session, node, name, *arguments)

    monkeypatch.setattr(prepared, "build_ahead", slow)
    monkeypatch.setattr(evaluate, "run_task", noting)
    evaluate_node(open_session(manifest, tasks), None, tmp_path / "ready")
    # The builder of the first also has the third.
    assert order == ["pages", "words", "choice", "last"]
    order.clear()
    evaluate_node(open_session(manifest, tasks), None, tmp_path / "turns")
    assert order == list(tasks)
    assert bytes_of(tmp_path / "ready") == bytes_of(tmp_path / "turns")


def test_where_all_is_kept_the_first_starts_no_other(manifest: Path, tasks: dict) -> None:
    own = open_session(manifest, tasks)
    for name in tasks:
        own.prepared(name)
    again = open_session(manifest, tasks)
    for name in tasks:
        again.prepared(name)
    while again.ahead.open:
        for one in multiprocessing.connection.wait(again.ahead.open):
            again.ahead._hear(one)
    assert len(own.ahead._at) == len(tasks)  # each was begun by somebody
    assert again.ahead._at == {}


def test_they_end_with_the_session_however_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_cache, "tokenizer_digest", lambda _: None)
    monkeypatch.setattr(request_cache, "nothing_to_build", lambda *_, **__: False)
    monkeypatch.setattr(prepared, "build_ahead", lambda *_, **__: time.sleep(600))
    task = SimpleNamespace(code=lambda _: contextlib.nullcontext())
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        begun = Ahead.begin(lambda: SimpleNamespace(tokenizer=None), {"a": task, "b": task}, 0, 2)
        while len(begun._at) < 2:
            for one in multiprocessing.connection.wait(begun.open):
                begun._hear(one)
        first = psutil.Process(begun.process.pid)
        sender.send([first.pid, *(one.pid for one in first.children())])
        time.sleep(600)
    pids = receiver.recv()
    assert len(set(pids)) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("said", "device", "gpus", "cores", "tasks", "expected"),
    [
        (None, "cpu", 1, 16, 8, 0),
        (None, "auto", 0, 16, 8, 0),
        (None, "mps", 0, 16, 8, 0),
        (None, "auto", 1, 16, 8, 7),
        (None, "cuda", 1, 16, 2, 2),
        (None, "cuda", 1, 2, 8, 1),
        (None, "cuda", 1, 1, 8, 0),
        ("0", "cuda", 1, 16, 8, 0),
        ("5", "cpu", 0, 1, 8, 5),
        ("5", "cpu", 0, 1, 2, 2),
    ],
)
def test_there_are_as_many_as_gain_something(
    said: str | None,
    device: str,
    gpus: int,
    cores: int,
    tasks: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(ahead.BUILDERS)
    if said is not None:
        monkeypatch.setenv(ahead.BUILDERS, said)
    monkeypatch.setattr(ahead, "visible_gpus", lambda: gpus)
    # As Snakemake says how many a job was given; else all that the process may use.
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
    assert builders(device, tasks) == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert builders(device, tasks) == expected


def test_a_number_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ahead.BUILDERS, "many")
    with pytest.raises(AtlasError, match=r"SPARSITY_ATLAS_BUILDERS: .* number of .*'many'"):
        builders("cpu", 3)


def test_what_cannot_be_made_without_weights_is_left_to_the_session(
    manifest: Path, tasks: dict, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AtlasError("no model without weights")

    monkeypatch.setattr(session, "_without_weights", refused)
    open_session(manifest, tasks).prepared("last")
    assert built == ["last", "arranged"]
