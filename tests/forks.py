"""The server of these tests' processes (`hooks/fork_server.py`), and how to run one of them."""

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


class Server:
    """A server, for as long as this object or its process lives.

    Attributes:
        address: its socket.
    """

    def __init__(self, folder: Path, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self.address = str(folder / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        lifeline, self._alive = os.pipe()
        own = (str(listener.fileno()), str(lifeline))
        # One thread: a fork has none but the one that forks.
        environment = {**SET_BY_THE_COMMAND, **env}
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, *own, *modules],
            env={key: value for key, value in environment.items() if key != "PYTHONPATH"},
            pass_fds=(listener.fileno(), lifeline),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        listener.close()
        os.close(lifeline)

    def close(self) -> None:
        """Let it end."""
        os.close(self._alive)
        self._process.wait()


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
