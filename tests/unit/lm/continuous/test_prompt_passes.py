"""Passes over prompts have few shapes, and what is kept of them gives what they give."""

from __future__ import annotations

import random
from collections import Counter as Tally
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generator import on_a_gpu, outcome
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.lm.continuous import recording
from sparsity_atlas.lm.continuous.prompt_passes import LARGEST, PromptPasses
from tiny_lm import GENERATION, open_session, rolling_documents, write_task

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 16


class Step:
    """As much of a step as a pass's length needs."""

    class ring:
        rows, size = 64, 900


def passes(**more: Any) -> PromptPasses:
    called = type("Called", (), {"device": torch.device("cpu")})
    return PromptPasses(called, None, Step, **{"together": 8, "padding": 0} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["falling", "any"])
def test_prompts_share_few_lengths(order: str) -> None:
    draw = random.Random(0)
    some, found = passes(), set()
    longest = [draw.randint(3, LARGEST // 8 - 20) for _ in range(400)]
    for one in sorted(longest, reverse=True) if order == "falling" else longest:
        length = some._length(one, 8)
        # At least one column is padding, and at most a quarter, beside what a multiple asks for.
        assert one < length <= (one + 1) * 4 / 3 + 16
        found.add(length)
    # From one to the next a third more, or a multiple.
    assert len(found) <= 24
    assert found == set(some._lengths)


def test_what_a_gpu_is_busy_with_for_longer_is_not_filled_up() -> None:
    some = passes()
    assert some._length(LARGEST // 8, 8) == LARGEST // 8 + 1
    assert some._lengths == []


def test_no_prompt_is_longer_than_its_row() -> None:
    some = passes()
    Step.ring.size = 101
    assert some._length(100, 8) == 101
    Step.ring.size = 900


def kept(monkeypatch: pytest.MonkeyPatch, *, wrong: bool = False) -> list[int]:
    """Have the CPU keep passes as a GPU does: what they made lies in one place, and is made anew there.

    Returns:
        How often each pass was made again, in the order in which they were kept.
    """
    times: list[int] = []

    def recorded(work: Callable[[], Any], memory: Any) -> tuple[Callable[[], None], Any]:
        made = work()
        number = len(times)
        times.append(0)

        def again() -> None:
            for one, other in zip(made, work(), strict=True):
                one.copy_(other + 1 if wrong and other.is_floating_point() else other)
            times[number] += 1

        return again, made

    begin = PromptPasses.begin

    def begun(self: PromptPasses, *arguments: Any) -> Any:
        self._keeps = self._keeps or not times
        wait = begin(self, *arguments)
        found = wait()  # on a GPU a copy is on its way
        copies = tuple(one.copy() for one in found)
        return lambda: type(found)(*copies)

    monkeypatch.setattr(recording, "recorded", recorded)
    monkeypatch.setattr(recording, "pool", lambda: None)
    monkeypatch.setattr(PromptPasses, "begin", begun)
    return times


class Waits(TorchDispatchMode):
    """Notes what a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        scalar = name.startswith("aten.index_put") and args[2].dim() == 0
        if scalar or "_local_scalar_dense" in name or "nonzero" in name:
            self.found.append(name)
        return func(*args, **kwargs or {})


def test_no_pass_waits_for_the_device(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    passed, waits = PromptPasses._pass, Waits()

    def spy(self: PromptPasses, table: Tensor) -> Any:
        # As transformers sees it when it is recorded.
        with monkeypatch.context() as recording, waits:
            recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            return passed(self, table)

    monkeypatch.setattr(PromptPasses, "_pass", spy)
    # Two prompts at a time at least: of one, what is assigned looks like a number.
    task = write_task(tmp_path / "t", "texts", rolling_documents(18), **GENERATION)
    session = open_session(manifest, {"texts": task}, batch_size=SIZE)
    outcome(session, Node.make({"rule": "topk"}, "intermediate", "0.5"), tmp_path)
    assert waits.found == []
    with waits:
        torch.zeros(3)[torch.tensor([1])] = 0
    assert len(waits.found) == 1


@pytest.mark.parametrize("wrong", [False, True])
def test_passes_that_are_kept(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, wrong: bool
) -> None:
    """27 prompts, two at a time once rows are busy, so that one has a copy beside it."""
    options = GENERATION["generation_kwargs"] | {"until": ["the", "r"], "max_gen_toks": 12}
    tasks = {
        "pair": write_task(
            tmp_path / "t",
            "pair",
            rolling_documents(27),
            **GENERATION | {"generation_kwargs": options},
        )
    }
    node = Node.make({"rule": "topp"}, "intermediate", "0.8")
    expected = outcome(open_session(manifest, tasks, batch_size=SIZE), node, tmp_path / "own")
    on_a_gpu(monkeypatch)
    shapes: Tally[torch.Size] = Tally()
    run = PromptPasses._run

    def spy(self: PromptPasses, table: Tensor) -> Any:
        shapes[table.shape] += 1
        return run(self, table)

    monkeypatch.setattr(PromptPasses, "_run", spy)
    times = kept(monkeypatch, wrong=wrong)
    found = outcome(open_session(manifest, tasks, batch_size=SIZE), node, tmp_path / "found")
    assert found == expected
    assert {lines for lines, _ in shapes} == {SIZE, SIZE // 8}
    # Each shape that came twice was tried then; what gave other numbers was not used, nor anything after it.
    again = [count for count in shapes.values() if count > 1]
    assert times == ([1] if wrong else [count - 1 for count in again])
