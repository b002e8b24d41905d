"""The worker's side: one model in memory, one request after the other."""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
import time
import traceback
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.evaluation.worker.slots import Slot
from sparsity_atlas.loading.devices import others_wait

# Seconds without a request after which a worker ends: longer than Snakemake takes from a job to the next.
IDLE = 20.0
# The same where another job waits for the worker's GPU: what Snakemake takes as a rule.
IDLE_WHILE_OTHERS_WAIT = 3.0


class Models:
    """The session of the latest request, kept for as long as what it was made from is the same."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._session: Any = None

    def session(
        self, manifest: Path, settings: dict[str, Any], code: str, task_files: list[str]
    ) -> Any:
        """A loaded model with its tasks; see `session.Session.open`."""
        from sparsity_atlas.evaluation.session import Session
        from sparsity_atlas.models.manifest import from_manifest
        from sparsity_atlas.terms import KINDS

        # It refuses a model that changed since its manifest was written.
        from_manifest(manifest, kinds=KINDS)
        key = (manifest.read_bytes(), json.dumps(settings), task_files)
        if key != self._key:
            self._key, self._session = None, None
            gc.collect()  # two models may not fit
            self._session = Session.open(manifest, settings, code)
            self._key = key
        return self._session.with_code(code)


class _Lines(logging.Handler):
    """Sends each log line to the client."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._connection, "line", record.getMessage())


def _send(connection: Connection, kind: str, text: str = "") -> None:
    connection.send_bytes(json.dumps({"kind": kind, "text": text}).encode())


def answer(connection: Connection, models: Models) -> None:
    """Serve one client: run the stage that it asks for, and tell it how that ended."""
    from sparsity_atlas.evaluation import evaluate

    try:
        request = json.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return  # killed before it asked for anything
    finished = threading.Event()
    threading.Thread(target=_end_with_client, args=(connection, finished), daemon=True).start()

    def open_session(manifest: Path, settings: dict[str, Any], code: str) -> Any:
        return models.session(manifest, settings, code, request["task_files"])

    lines = _Lines(connection)
    cli.logger.addHandler(lines)
    try:
        evaluate.main(request["arguments"], open_session)
    except BaseException as error:  # noqa: BLE001 (the client ends with it, this process goes on)
        finished.set()
        mended = cli.what_can_be_mended(error)
        if mended:
            _send(connection, "error", str(mended))
        elif isinstance(error, SystemExit):  # of argparse
            _send(connection, "error", f"exit code {error.code}; why is in the worker's log")
        else:
            _send(connection, "crash", traceback.format_exc())
    else:
        finished.set()
        _send(connection, "done")
    finally:
        cli.logger.removeHandler(lines)


def _end_with_client(connection: Connection, finished: threading.Event) -> None:
    """End this process when the client is gone in the middle: nobody waits for the rest.

    The journal keeps what is done, as if the job itself had been killed.
    """
    try:
        connection.poll(None)
        connection.recv_bytes()
    except (EOFError, OSError):
        if not finished.is_set():
            os._exit(1)


def serve(folder: Path, idle: float = IDLE) -> None:
    """Serve clients until none has come for a while; a shorter while if other jobs wait for its GPU.

    Args:
        folder: of the slot.
        idle: seconds without a client after which to end.
    """
    slot = Slot(folder)
    models = Models()
    busy = threading.Lock()
    latest = time.monotonic()

    def leave_when_idle() -> None:
        while True:
            time.sleep(min(idle, 1.0) / 2)
            rested = time.monotonic() - latest
            if rested < idle and not (rested >= IDLE_WHILE_OTHERS_WAIT and others_wait()):
                continue
            if not busy.acquire(blocking=False):
                continue
            # A client holds the slot from before it connects: with the lock here, there is none.
            lock = slot.try_lock()
            if lock is None:
                busy.release()
                continue
            slot.socket.unlink(missing_ok=True)
            os._exit(0)

    with Listener(str(slot.socket), family="AF_UNIX", authkey=slot.key) as listener:
        threading.Thread(target=leave_when_idle, daemon=True).start()
        while True:
            try:
                connection = listener.accept()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # a stranger, or a client that was killed while it knocked
            with connection, busy:
                answer(connection, models)
                latest = time.monotonic()
