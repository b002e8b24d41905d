"""Writer threads: order, bound, and what becomes of errors."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sparsity_atlas.activations.spool import HostCopy, Writer, copy_stream


def test_tasks_run_in_order_beside_their_caller() -> None:
    done: list[int] = []
    gate = threading.Event()
    with Writer(8) as writer:
        writer.submit(gate.wait)
        for number in range(5):
            writer.submit(done.append, number)
        assert done == []
        gate.set()
        writer.drain()
        assert done == [0, 1, 2, 3, 4]


def test_no_more_wait_than_may() -> None:
    gate, started = threading.Event(), threading.Semaphore(0)

    def task() -> None:
        started.release()
        gate.wait()

    with Writer(2) as writer:
        writer.submit(task)
        writer.submit(task)
        third = threading.Thread(target=writer.submit, args=(task,))
        third.start()
        started.acquire()
        third.join(0.1)
        assert third.is_alive()
        gate.set()
        third.join()
        writer.drain()


class DiskFull(Exception):
    pass


def fail() -> None:
    raise DiskFull


def test_an_error_is_raised_by_the_next_call() -> None:
    with Writer(4) as writer:
        writer.submit(fail)
        with pytest.raises(DiskFull):
            writer.drain()
    with Writer(1) as writer:
        writer.submit(fail)
        with pytest.raises(DiskFull):
            writer.submit(print)


def test_what_has_not_begun_is_dropped_when_the_caller_fails() -> None:
    gate, done = threading.Event(), []

    def leave() -> None:
        with Writer(8) as writer:
            writer.submit(gate.wait)
            writer.submit(done.append, 1)
            threading.Timer(0.05, gate.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert done == []


def test_a_task_may_wait_for_earlier_ones() -> None:
    """Of several threads too: tasks begin in order, so that what one waits for has begun."""
    for threads in (1, 2, 3):
        with Writer(16, threads=threads) as writer:
            before = [writer.submit(time.sleep, 0.01) for _ in range(4)]
            last = writer.submit(lambda: [one.result() for one in before])  # noqa: B023
            assert last.result(timeout=30) == [None] * 4
            writer.drain()


def test_threads_work_side_by_side() -> None:
    both = threading.Barrier(2)
    with Writer(4, threads=2) as writer:
        writer.submit(both.wait, 30)
        writer.submit(both.wait, 30)
        writer.drain()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_copy_knows_whether_it_is_finite(value: float) -> None:
    values = torch.ones(3, 4)
    assert HostCopy(values, None).is_finite()
    values[1, 2] = value
    assert not HostCopy(values, None).is_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_a_copy(dtype: torch.dtype) -> None:
    values = torch.arange(12).to(dtype).view(3, 4)
    left = values[:, :2]
    copy = HostCopy(left, copy_stream(values.device))
    wanted = left.clone()
    values.zero_()
    assert torch.equal(copy.wait(), wanted)
    assert copy.wait().is_contiguous()
