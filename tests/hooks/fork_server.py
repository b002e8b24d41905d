"""A server that has imported the libraries, and processes that are forked from it.

Importing torch and its kin takes a stage longer than its work on a tiny model. The server imports them
once, and nothing of this project, so that each process has the source files of its own working copy. It
is otherwise a process like any other: of its own session, with the directory, environment and streams
that it is given, ended by signals and the exit code that it would have.

    python fork_server.py LIFELINE LISTENER MODULE... [-- LISTENER MODULE...]...

A pipe that closes with who wants the server, a listening socket, and what to import. Behind each "--" is what
a further server has beside the modules of the one before it, of which it is a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Read when a library is imported: a process that has them otherwise must import it itself.
READ_AT_IMPORT = ("TQDM_", "TORCH", "NUMBA_", "TRITON_", "CUDA_", "OMP_", "XDG_CACHE_HOME")
# The same where the server has imported what is there for the Hub.
READ_FOR_THE_HUB = ("HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_")
# Not these: the first, which Slurm sets for a job that has a GPU, is read when a device is first used, the
# second, which torch sets itself at times, when something is compiled; and the last is told (`keep_code_in`).
READ_LATER = {"CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_CACHE_DIR", "HF_MODULES_CACHE"}
# What the one command sets before it imports any of them.
SET_BY_THE_COMMAND = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    prefixes = READ_AT_IMPORT
    prefixes += READ_FOR_THE_HUB if "huggingface_hub" in sys.modules else ()
    every = {**SET_BY_THE_COMMAND, **environment}
    return {key: every[key] for key in every.keys() - READ_LATER if key.startswith(prefixes)}


def keep_code_in(folder: str) -> None:
    """Have transformers, imported or not, copy there what models bring as code."""
    os.environ["HF_MODULES_CACHE"] = folder
    if "transformers.dynamic_module_utils" in sys.modules:
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = folder


@dataclasses.dataclass
class _Child:
    """A process that was forked, and who asked for it.

    Attributes:
        ended: its pidfd.
        asked: the connection; who is gone has closed it.
        told: whether its end was answered.
    """

    pid: int
    ended: int
    asked: socket.socket
    told: bool = False

    def tell(self) -> None:
        """Answer with its end."""
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        with contextlib.suppress(ConnectionError):
            self.asked.sendall(json.dumps({"code": code}).encode() + b"\n")
        self.told = True

    def close(self) -> None:
        """Know no more of it."""
        os.close(self.ended)
        self.asked.close()


def _await_request(
    listener: socket.socket, lifeline: int, before: Mapping[str, str]
) -> dict[str, Any] | None:
    """Fork for each request. Returns in the forked processes, and in the server at its end (None).

    `before` is the environment in which the libraries were imported.
    """
    children: list[_Child] = []
    listening: list[socket.socket | int] = [listener, lifeline]
    while listening or children:
        ends = [one.ended for one in children if not one.told]
        ready, _, _ = select.select([*listening, *ends, *(one.asked for one in children)], [], [])
        for one in list(children):
            if not one.told and one.ended in ready:
                one.tell()
            elif one.asked in ready and one.told:
                # Until somebody has heard of its end, its id is its own.
                os.waitpid(one.pid, 0)
                one.close()
                children.remove(one)
            elif one.asked in ready:  # who asked is gone
                os.kill(one.pid, signal.SIGKILL)
                one.tell()
        if lifeline in ready:
            # Nobody asks any more; what runs has its end.
            listener.close()
            listening = []
        elif listener in ready:
            connection, _ = listener.accept()
            request = _asked(connection, before)
            if request is None:
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                for one in children:
                    one.close()
                connection.close()
                listener.close()
                os.close(lifeline)
                return request
            for stream in request["streams"]:
                os.close(stream)
            children.append(_Child(pid, os.pidfd_open(pid), connection))
            with contextlib.suppress(ConnectionError):
                connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
    return None


def _asked(connection: socket.socket, before: Mapping[str, str]) -> dict[str, Any] | None:
    """What a process is asked to do, None where it is refused, or where who asked is gone."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    line = connection.makefile().readline()
    if not line:
        for stream in streams:
            os.close(stream)
        return None
    request = json.loads(line)
    # Libraries set some when they are imported, here and in the process that asks.
    imported = {key: os.environ[key] for key in os.environ.keys() - before.keys()}
    environment = {**imported, **request["env"]}
    asked, had = _read_at_import(environment), _read_at_import({**imported, **before})
    # Snakemake itself has no use for them.
    if asked != had and request["arguments"][:2] != ["-m", "snakemake"]:
        others = ", ".join(sorted({key for key, _ in asked.items() ^ had.items()}))
        with contextlib.suppress(ConnectionError):
            connection.sendall(json.dumps({"refused": f"another {others}"}).encode() + b"\n")
        for stream in streams:
            os.close(stream)
        return None
    return {**request, "streams": streams, "env": environment}


def _become(request: dict[str, Any]) -> None:
    """Do as a new Python process with these arguments does."""
    os.setsid()
    # As at a terminal, wherever the server was started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # as TMPDIR says
    environment = request["env"]
    os.environ.clear()
    os.environ.update(environment)
    if "HF_MODULES_CACHE" in environment:
        keep_code_in(environment["HF_MODULES_CACHE"])
    folders = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    flag, what, *rest = request["arguments"]
    sys.path[:] = [request["cwd"] if flag == "-m" else "", *folders, *sys.path[1:]]
    sys.orig_argv[1:] = request["arguments"]
    sys.argv[:] = [flag, *rest]
    importlib.invalidate_caches()
    for hook in ("polling", "watch"):
        if importlib.util.find_spec(hook):
            importlib.import_module(hook)
    if what == "snakemake":
        # It looks for its plugins when it is imported; there may be more on this path.
        registry = importlib.import_module("snakemake_interface_executor_plugins.registry")
        registry.ExecutorPluginRegistry().collect_plugins()
    with _ending_at_once():
        if flag == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Have the process end when it has done what Python does at an end, but for taking itself apart.

    That takes time, and libraries that were imported for nothing complain then.
    """
    code = 0
    _last_words.append(lambda: code)
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        code = -signal.SIGINT
        raise
    except BaseException:
        code = 1
        raise


_last_words: list[Callable[[], int]] = []


def _end() -> None:
    if not _last_words:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    code = _last_words[0]()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _import(modules: list[str]) -> None:
    """Import them, to stay."""
    for name in modules:
        importlib.import_module(name)
    # What they would take apart at their end is this process's: each fork would go through all of it.
    weakref.finalize._registry.clear()
    gc.collect()
    gc.freeze()


def main() -> None:
    """The servers."""
    lifeline, *words = sys.argv[1:]
    before = dict(os.environ)
    atexit.register(_end)  # before any library's: it comes last
    each = [list(group) for mark, group in itertools.groupby(words, "--".__eq__) if not mark]
    listeners = [socket.socket(fileno=int(number)) for number, *_ in each]
    further = 0
    for _, *modules in each:
        own = listeners.pop(0)
        _import(modules)
        further = os.fork() if listeners else 0
        if further:
            break
        if listeners:
            own.close()
    for other in listeners:
        other.close()
    request = _await_request(own, int(lifeline), before)
    if request is not None:
        _become(request)
        return
    if further:
        os.waitpid(further, 0)
    os._exit(0)


if __name__ == "__main__":
    main()
