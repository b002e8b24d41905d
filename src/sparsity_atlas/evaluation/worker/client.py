"""The job's side: find or start a worker, hand it the command line, pass its log lines on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.code_version import code_version
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.worker.slots import Slot, folder_for, free_slot, places
from sparsity_atlas.loading.devices import inside_allocation
from sparsity_atlas.tasks.local_files import files_digest, variables

TRIES = 3


def wanted() -> bool:
    """Whether a job should use a worker.

    Not inside an allocation of a cluster: what a job leaves behind there is killed or holds the
    allocation. And not with SPARSITY_ATLAS_WORKER=off.
    """
    return os.environ.get("SPARSITY_ATLAS_WORKER") != "off" and not inside_allocation()


def task_files(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Digests of the local files that the tasks are made of, as they are now."""
    return [
        files_digest(entry.get("include"), entry.get("task", name), entry.get("override"))
        for name, entry in tasks.items()
    ]


def ask(arguments: list[str], model: Path, settings: dict[str, Any]) -> None:
    """Have a worker run the stage `evaluate`.

    Args:
        arguments: its command line.
        model: the model's manifest.
        settings: as `grid.evaluation_slice` gives it.

    Raises:
        AtlasError: what the stage raised in the worker; workers that keep dying.
    """
    request = {"arguments": arguments, "task_files": task_files(settings["tasks"])}
    folder = folder_for(model, code_version("evaluate"), variables(settings["tasks"]))
    for _ in range(TRIES):
        with free_slot(folder, places(settings["device"])) as (slot, connection):
            try:
                with connection or _start(slot) as worker:
                    return _converse(worker, request)
            except (EOFError, ConnectionError):
                # Killed, perhaps for its memory. What it had finished of the node is in the journal.
                cli.logger.warning("the worker died; starting another one")
    raise AtlasError(f"workers died {TRIES} times at this node; the last one's log: {slot.log}")


def _start(slot: Slot) -> Connection:
    """Start a slot's worker and connect to it."""
    slot.socket.unlink(missing_ok=True)
    _ = slot.key  # made here: the worker must find it
    with slot.log.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsity_atlas", "node", "--serve", slot.folder],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Of its own session: it outlives the job that starts it.
            start_new_session=True,
        )
    while process.poll() is None:
        connection = slot.connect()
        if connection is not None:
            return connection
        time.sleep(0.02)
    raise AtlasError(
        f"a worker could not be started (exit code {process.returncode}); its log: {slot.log}"
    )


def _converse(worker: Connection, request: dict[str, Any]) -> None:
    worker.send_bytes(json.dumps(request).encode())
    while True:
        answer = json.loads(worker.recv_bytes())
        match answer["kind"]:
            case "line":
                cli.logger.info("%s", answer["text"])
            case "error":
                raise AtlasError(answer["text"])
            case "crash":
                sys.stderr.write(answer["text"])
                raise SystemExit(1)
            case "done":
                return
