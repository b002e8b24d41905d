"""The servers of these tests' processes (`hooks/fork_server.py`), and how to run one of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hooks.fork_server import SET_BY_THE_COMMAND
from hooks.forking import Forked

SCRIPT = Path(__file__).parent / "hooks" / "fork_server.py"


class Servers:
    """A server of each of some sets of libraries, for as long as this object or its process lives.

    Attributes:
        addresses: their sockets.
    """

    def __init__(
        self, folder: Path, libraries: Sequence[Sequence[str]], env: Mapping[str, str]
    ) -> None:
        """Start them.

        Args:
            folder: for the sockets.
            libraries: for each server, the modules that it imports beside those of the servers before it.
            env: their environment.
        """
        self.addresses = [str(folder / f"socket-{number}") for number in range(len(libraries))]
        listeners = [_listener(address) for address in self.addresses]
        lifeline, self._alive = os.pipe()
        words = [str(lifeline)]
        for number, (listener, modules) in enumerate(zip(listeners, libraries, strict=True)):
            words += [*(["--"] if number else []), str(listener.fileno()), *modules]
        # One thread: a fork has none but the one that forks.
        environment = {**SET_BY_THE_COMMAND, **env}
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            env={key: value for key, value in environment.items() if key != "PYTHONPATH"},
            pass_fds=(lifeline, *(listener.fileno() for listener in listeners)),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for listener in listeners:
            listener.close()
        os.close(lifeline)

    def close(self) -> None:
        """Let them end."""
        os.close(self._alive)
        self._process.wait()


def _listener(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    return listener


def run(*arguments: str, merged: bool = True, **how: Any) -> subprocess.CompletedProcess[str]:
    """Start a process as `Forked` does and wait for its end; with `merged`, its errors are in its output."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        second = output if merged else errors
        with open(os.devnull) as nothing:
            streams = nothing.fileno(), output.fileno(), second.fileno()
            process = Forked(arguments=arguments, streams=streams, **how)
        try:
            code = process.wait(timeout=600)
        except BaseException:
            process.end()
            raise
        for file in (output, errors):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())
