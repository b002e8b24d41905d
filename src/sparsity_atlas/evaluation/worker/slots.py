"""Where workers are found: a private folder a model, in it a slot a worker."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import IO, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import digest
from sparsity_atlas.loading.devices import gpu_shares, visible_gpus

# What a worker inherits from the job that starts it and another job may have otherwise.
_ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "XDG_CACHE_HOME")
_ENVIRONMENT_OF = ("SPARSITY_ATLAS_", "HF_", "NUMBA_", "TRITON_")
MOST = 64


@dataclass(frozen=True)
class Slot:
    """A place for one worker: lock, socket, key and log. Whoever holds the lock has it to himself."""

    folder: Path

    @property
    def socket(self) -> Path:
        """Address of the worker."""
        return self.folder / "socket"

    @property
    def key(self) -> bytes:
        """What client and worker authenticate each other with, made by the first who asks."""
        path = self.folder / "key"
        if not path.exists():
            descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(os.urandom(32))
        return path.read_bytes()

    @property
    def log(self) -> Path:
        """What the worker prints beside what it streams."""
        return self.folder / "log"

    def try_lock(self) -> IO[str] | None:
        """The lock's open file, or None if somebody else has it; closing it frees the slot."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (self.folder / "lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def connect(self) -> Connection | None:
        """A connection to the slot's worker, None if there is none. Only under the slot's lock."""
        try:
            return Client(str(self.socket), family="AF_UNIX", authkey=self.key)
        except (FileNotFoundError, ConnectionError, EOFError):
            return None


def folder_for(model: Path, code: str, variables: dict[str, str | None] | None = None) -> Path:
    """Folder of the workers for a model.

    Args:
        model: its manifest.
        code: version of the code that a worker would run; an edit brings workers of its own.
        variables: of the environment, that the tasks ask for; see `local_files.variables`.

    Raises:
        AtlasError: the folder belongs to somebody else.
    """
    identity = {
        "directory": os.getcwd(),
        "python": sys.executable,
        "model": str(model),
        "code": code,
        "variables": variables or {},
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_OF)
        },
    }
    # Short: the path of a socket has room for about a hundred characters.
    base = Path(tempfile.gettempdir(), f"sparsity-atlas-{os.getuid()}")
    base.mkdir(mode=0o700, exist_ok=True)
    state = base.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise AtlasError(f"{base}: expected a folder that is this user's alone")
    return base / digest(identity)[:16]


def places(device: str) -> int:
    """Workers that a model may have at once: one a GPU, or as many as share it; on the CPU as many as
    Snakemake runs jobs.

    Args:
        device: as in the configuration.
    """
    return min(visible_gpus() * gpu_shares() if device != "cpu" else 0, MOST) or MOST


@contextlib.contextmanager
def free_slot(folder: Path, count: int, poll: float = 0.1) -> Iterator[tuple[Slot, Any]]:
    """Hold a slot: one with a worker that waits, else an empty one; wait if all are taken.

    Yields:
        The slot and a connection to its worker, None if it has no worker yet.
    """
    while True:
        empty: tuple[Slot, IO[str]] | None = None
        for number in range(count):
            slot = Slot(folder / str(number))
            lock = slot.try_lock()
            if lock is None:
                continue
            connection = slot.connect()
            if connection is None and empty is None:
                empty = (slot, lock)
                continue
            if connection is None:
                lock.close()
                continue
            if empty is not None:
                empty[1].close()
            with lock, connection:
                yield slot, connection
            return
        if empty is not None:
            with empty[1]:
                yield empty[0], None
            return
        time.sleep(poll)
