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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

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
MOST = 7
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
class Ahead:
    """What builds a session's requests beside it; nothing, unless it was begun.

    Attributes:
        process: the first of the builders, which the others end with; None if there is none.
        open: where they are heard; one that has ended is not among them.
    """

    process: BaseProcess | None = None
    open: list[Connection] = field(default_factory=list)
    _at: dict[str, Connection] = field(default_factory=dict)  # tasks that somebody has in hand
    _done: dict[str, list[Line]] = field(default_factory=dict)
    _digest: str | None = None

    @classmethod
    def begin(
        cls, empty: Callable[[], JournalledLM], tasks: dict[str, LoadedTask], seed: int, count: int
    ) -> Ahead:
        """Start these processes.

        Args:
            empty: makes the language model without its weights.
            tasks: in the order in which they will be asked for.
            seed: of few-shot draws.
            count: of processes.
        """
        context = multiprocessing.get_context("fork")
        receivers, senders = zip(*(context.Pipe(duplex=False) for _ in range(count)), strict=True)
        gc.freeze()  # looking for garbage writes to all that they share with this process
        process = context.Process(
            target=_first, args=(list(senders), os.getpid(), empty, tasks, seed), daemon=True
        )
        process.start()
        for sender in senders:
            sender.close()
        return cls(process, list(receivers))

    def ready(self, name: str) -> bool:
        """Whether `wait` would not."""
        if self.process is not None:
            for connection in wait(self.open, 0):
                assert isinstance(connection, multiprocessing.connection.Connection)
                self._hear(connection)
        return self.process is None or name in self._done or not self._expected(name)

    def wait(self, name: str, lm: JournalledLM) -> None:
        """Wait until a task's requests are in the cache, or nobody will put them there.

        Args:
            name: of the task.
            lm: that will ask for them; is told the digest of its tokenizer.
        """
        from sparsity_atlas.tasks.request_cache import remember_digest

        if self.process is None:
            return
        self.first_of([name])
        if not self.open:
            self.process.join()
        if self._digest is not None:
            remember_digest(lm.tokenizer, self._digest)
        for level, line in self._done.pop(name, ()):
            cli.logger.log(level, "%s", line)

    def first_of(self, names: Sequence[str]) -> str:
        """The first of some tasks that nobody has in hand any more; waits until there is one.

        Args:
            names: of the tasks, one at least.
        """
        computed, since = -1.0, time.monotonic()
        while not (ready := [name for name in names if self.ready(name)]):
            assert self.process is not None, "else all are ready"
            heard = wait(self.open, 1.0)
            now = computed if heard else _seconds(self.process.pid)
            if heard or now > computed:
                computed, since = now, time.monotonic()
            elif time.monotonic() - since > STALLED:
                self.process.kill()
        return ready[0]

    def _expected(self, name: str) -> bool:
        """Whether anybody may still build a task."""
        return bool(self.open) if name not in self._at else self._at[name] in self.open

    def _hear(self, connection: Connection) -> None:
        try:
            kind, name, found = connection.recv()
        except (EOFError, ConnectionError):
            self.open.remove(connection)
            return
        match kind:
            case "tokenizer":
                self._digest = found
            case "begins":
                self._at[name] = connection
            case "done":
                self._done[name] = found


def _seconds(pid: int | None) -> float:
    """Of a processor, that a process and what it started have computed for."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for one in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(one.cpu_times()[:2])
    return total


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


def _first(
    senders: list[Connection],
    parent: int,
    empty: Callable[[], JournalledLM],
    tasks: dict[str, LoadedTask],
    seed: int,
) -> None:
    """The life of the first builder, which starts the others once it knows that there is work for them."""
    import torch

    from sparsity_atlas.tasks.request_cache import nothing_to_build, tokenizer_digest

    _end_with(parent)
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_DFL)
    # Threads that were there before have not come along.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    cli.logger.handlers, cli.logger.propagate = [_Said()], False
    try:
        lm = empty()
    except Exception:  # noqa: BLE001 (the session will make the model itself and say what is wrong)
        return
    senders[0].send(("tokenizer", "", tokenizer_digest(lm.tokenizer)))
    missing = []
    for name, task in tasks.items():
        if nothing_to_build(lm, task, seed=seed):
            senders[0].send(("done", name, []))
        else:
            missing.append(name)
    own = os.getpid()
    shares = [missing[start :: len(senders)] for start in range(len(senders))]
    for number in range(1, len(senders)):
        if shares[number] and not os.fork():
            # Whatever happens, nothing that the first one does after this is done twice.
            try:
                _end_with(own)
                for sender in (*senders[:number], *senders[number + 1 :]):
                    sender.close()
                _build(senders[number], lm, {name: tasks[name] for name in shares[number]}, seed)
            finally:
                os._exit(0)
        senders[number].close()
    _build(senders[0], lm, {name: tasks[name] for name in shares[0]}, seed)
    senders[0].close()
    with contextlib.suppress(ChildProcessError):  # until there is none left: they end with this one
        while True:
            os.wait()


def _build(sender: Connection, lm: JournalledLM, tasks: dict[str, LoadedTask], seed: int) -> None:
    from sparsity_atlas.tasks.prepared import build_ahead

    (said,) = cli.logger.handlers
    assert isinstance(said, _Said)
    for name in tasks:
        sender.send(("begins", name, None))
    for name, task in tasks.items():
        said.take()
        try:
            with task.code("its requests cannot be built"):
                build_ahead(lm, task, seed=seed)
        except Exception:  # noqa: BLE001 (the session will find nothing, build them, and say why it cannot)
            said.take()
        sender.send(("done", name, said.take()))


def _end_with(parent: int) -> None:
    """Have this process killed when another one ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
