"""The side of those who ask `fork_server.py` for a process.

Of the processes under test, their environment has
FORK_SERVER    the server's socket; Snakemake's jobs and what runs in these have their work done in forks
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn


def _answer(connection: socket.socket) -> dict[str, Any]:
    """The server's next line, and no byte more: of what is left, `select` must know."""
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1) or b'{"refused": "the server is gone"}\n'
    return json.loads(line)


class Forked:
    """A process made by the server, with what of `subprocess.Popen` the tests use.

    Attributes:
        pid: its id, and that of its process group.
        returncode: as of `Popen`.
    """

    def __init__(
        self,
        server: str,
        arguments: Sequence[str],
        *,
        cwd: str | os.PathLike[str],
        env: Mapping[str, str],
        streams: tuple[int, int, int],
    ) -> None:
        """Start it.

        Args:
            server: the server's socket.
            arguments: Python's own: `-m MODULE ...` or `-c CODE ...`.
            cwd: where it runs.
            env: its whole environment.
            streams: descriptors of its standard input, output and error.

        Raises:
            BlockingIOError: it needs libraries that are imported with another environment.
        """
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server)
        request = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "env": dict(env)}
        socket.send_fds(self._connection, [b"x"], streams)
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        answer = _answer(self._connection)
        if "refused" in answer:
            raise BlockingIOError(answer["refused"])
        self.pid: int = answer["pid"]

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code, or minus the signal that ended it.

        Raises:
            TimeoutError: it has not ended after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise TimeoutError(f"forked process {self.pid} runs after {timeout} s")
            self.returncode = _answer(self._connection)["code"]
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def kill(self) -> None:
        """Kill it alone."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """End it and its group, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def hand_over() -> None:
    """Have the one command or Snakemake run in a fork, and end as that does.

    Do nothing where its libraries have another environment.
    """
    words = sys.orig_argv[1:]
    server = os.environ.get("FORK_SERVER")
    if not server or words[:1] != ["-m"] or words[1] not in ("sparsity_atlas", "snakemake"):
        return
    with contextlib.suppress(BlockingIOError):
        end_as_a_fork(server, words)


def end_as_a_fork(server: str, words: Sequence[str]) -> NoReturn:
    """Have a fork do what Python does with these arguments, with this process's streams, and end as it does.

    Raises:
        BlockingIOError: it needs libraries that are imported with another environment.
    """
    forked = Forked(server, words, cwd=os.getcwd(), env=os.environ, streams=(0, 1, 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(forked.pid, number))
    code = forked.wait()
    if code < 0:
        if -code in (signal.SIGINT, signal.SIGTERM):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
