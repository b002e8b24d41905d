"""From the device to the disk while the model runs: copies that are not waited for, writer threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


class HostCopy:
    """A tensor's copy in host memory, perhaps still on its way.

    On CUDA the copy runs on a stream of its own into pinned memory; the model goes on meanwhile, and may
    overwrite the tensor.
    """

    def __init__(self, values: Tensor, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy.

        Args:
            values: the model's tensor.
            stream: for the copies from its device, see `copy_stream`.
        """
        self._arrived: torch.cuda.Event | None = None
        self._finite: Tensor | None = None
        own = values.detach().clone(memory_format=torch.contiguous_format)
        if stream is None:
            self._tensor = own.cpu()
            return
        self._tensor = torch.empty(own.shape, dtype=own.dtype, pin_memory=True)
        self._finite = torch.empty((), dtype=torch.bool, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(own.device))
        with torch.cuda.stream(stream):
            self._tensor.copy_(own, non_blocking=True)
            self._finite.copy_(torch.isfinite(own).all(), non_blocking=True)
            self._arrived = stream.record_event()
        # The memory of `own` may be given away once this stream has read it.
        own.record_stream(stream)

    def wait(self) -> Tensor:
        """The copy, when it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor

    def is_finite(self) -> bool:
        """Whether the copy has neither NaN nor infinity; a CUDA device has found it out."""
        copy = self.wait()
        return bool(torch.isfinite(copy).all() if self._finite is None else self._finite)


def as_stored(values: Tensor, dtype: str) -> np.ndarray:
    """A tensor on the CPU in the store's type; bfloat16 as its bits."""
    whole = values.to(getattr(torch, dtype))
    found: np.ndarray = (
        whole.view(torch.uint16) if whole.dtype == torch.bfloat16 else whole
    ).numpy()
    return found


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for the copies from a CUDA device; None for other devices."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Writer:
    """Begins tasks in their order, in threads of its own.

    At most `pending` tasks wait or run; `submit` then waits for the oldest. What a task raises is raised by a
    later `submit` or `drain`. A task may wait for earlier ones. Leaving the context drops what has not begun.
    """

    def __init__(self, pending: int, threads: int = 1) -> None:
        self._pending = pending
        self._tasks: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="writer")

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Hand over a task; its result comes by the future."""
        while self._tasks and (self._tasks[0].done() or len(self._tasks) >= self._pending):
            self._tasks.popleft().result()
        self._tasks.append(self._pool.submit(task, *arguments))
        return self._tasks[-1]

    def drain(self) -> None:
        """Wait until all tasks are done."""
        while self._tasks:
            self._tasks.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
