"""Processes that build the requests of a session's tasks while its model is loaded and other tasks run.

They leave them in the cache where requests are kept for all, and the session finds them there, so that what
is evaluated is the same with and without them. What goes wrong in one of them goes wrong once more in the
session, which says so. They are forked: tasks and tokenizer are there, and starting Python anew takes longer
than most suites do. No GPU is touched before, and none by them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.devices import visible_gpus

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from sparsity_atlas.lm.journalled import JournalledLM
    from sparsity_atlas.tasks.loaded import LoadedTask

# Of the environment: how many there are, whatever the device and the cores.
BUILDERS = "SPARSITY_ATLAS_BUILDERS"
# More of them would wait for the largest task's.
MOST = 3
# Seconds of waiting in which one that computes nothing is given up: it waits for what a thread of the session
# held when it was forked, or for a network.
STALLED = 15.0
_PR_SET_PDEATHSIG = 1

# Level and text of a log line.
Line = tuple[int, str]


def builders(device: str, tasks: int) -> int:
    """How many of these processes a session has.

    None where the model runs on a CPU, since there its passes want the cores; else one for each core beside
    the session's own, no more than there are tasks.

    Args:
        device: as in the configuration.
        tasks: their number.

    Raises:
        AtlasError: the environment says no such number.
    """
    value = os.environ.get(BUILDERS)
    if value is not None:
        if not value.isdecimal():
            raise AtlasError(f"{BUILDERS}: expected a number of processes, found '{value}'")
        return min(int(value), tasks)
    on_gpu = device in ("auto", "cuda") and visible_gpus() > 0
    return min(_cores() - 1, MOST, tasks) if on_gpu and sys.platform == "linux" else 0


def _cores() -> int:
    """Cores of this process: as many as Snakemake gave the job, which it says in this variable."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else len(os.sched_getaffinity(0))


@dataclass
class _Builder:
    """One process, and what it has said so far.

    Attributes:
        done: of each task that it is done with the log lines.
    """

    process: BaseProcess
    connection: Connection
    done: dict[str, list[Line]] = field(default_factory=dict)
    tokenizer: str | None = None

    def listen(self, name: str) -> None:
        """Return when it is done with a task, or will never be."""
        computed, since = -1.0, time.monotonic()
        with contextlib.suppress(EOFError, ConnectionError):  # its end
            while name not in self.done:
                if self.connection.poll(1.0):
                    task, found = self.connection.recv()
                    if task is None:
                        self.tokenizer = found
                    else:
                        self.done[task] = found
                    continue
                with contextlib.suppress(psutil.NoSuchProcess):
                    now = sum(psutil.Process(self.process.pid).cpu_times()[:2])
                    if now > computed:
                        computed, since = now, time.monotonic()
                if time.monotonic() - since > STALLED:
                    self.process.kill()
            return
        self.process.join()


@dataclass
class Ahead:
    """What builds a session's requests beside it; nothing, unless it was begun."""

    _builders: dict[str, _Builder] = field(default_factory=dict)  # by task

    @classmethod
    def begin(
        cls, empty: Callable[[], JournalledLM], tasks: dict[str, LoadedTask], seed: int, count: int
    ) -> Ahead:
        """Start these processes, each with every so many tasks.

        Args:
            empty: makes the language model without its weights.
            tasks: in the order in which they will be asked for.
            seed: of few-shot draws.
            count: of processes.
        """
        context = multiprocessing.get_context("fork")
        found: dict[str, _Builder] = {}
        names = list(tasks)
        gc.freeze()  # looking for garbage writes to all that they share with this process
        for number in range(count):
            own = names[number::count]
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_build,
                args=(sender, os.getpid(), empty, {name: tasks[name] for name in own}, seed),
                daemon=True,
            )
            process.start()
            sender.close()
            found |= dict.fromkeys(own, _Builder(process, receiver))
        return cls(found)

    def wait(self, name: str, lm: JournalledLM) -> None:
        """Wait until a task's requests are in the cache, or nobody will put them there.

        Args:
            name: of the task.
            lm: that will ask for them; is told the digest of its tokenizer.
        """
        from sparsity_atlas.tasks.request_cache import remember_digest

        builder = self._builders.pop(name, None)
        if builder is None:
            return
        builder.listen(name)
        if builder.tokenizer is not None:
            remember_digest(lm.tokenizer, builder.tokenizer)
        for level, line in builder.done.pop(name, ()):
            cli.logger.log(level, "%s", line)


class _Said(logging.Handler):
    """Keeps what is logged for the session to say."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelno, record.getMessage()))

    def take(self) -> list[Line]:
        """What came since the last call."""
        found, self._lines = self._lines, []
        return found


def _build(
    sender: Connection,
    parent: int,
    empty: Callable[[], JournalledLM],
    tasks: dict[str, LoadedTask],
    seed: int,
) -> None:
    """The life of such a process."""
    _end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # Threads that were there before have not come along.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    said = _Said()
    cli.logger.handlers, cli.logger.propagate = [said], False
    for task, found in _built(empty, tasks, seed, said):
        sender.send((task, found))


def _built(
    empty: Callable[[], JournalledLM], tasks: dict[str, LoadedTask], seed: int, said: _Said
) -> Iterator[tuple[str | None, Any]]:
    import torch

    from sparsity_atlas.tasks.prepared import build_ahead
    from sparsity_atlas.tasks.request_cache import tokenizer_digest

    torch.set_num_threads(1)
    try:
        lm = empty()
    except Exception:  # noqa: BLE001 (the session will make the model itself and say what is wrong)
        return
    yield None, tokenizer_digest(lm.tokenizer)
    for name, task in tasks.items():
        said.take()
        try:
            with task.code("its requests cannot be built"):
                build_ahead(lm, task, seed=seed)
        except Exception:  # noqa: BLE001 (likewise: it will find nothing, and build them)
            said.take()
        yield name, said.take()


def _end_with(parent: int) -> None:
    """Have this process killed when the session's ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
