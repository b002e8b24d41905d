"""What each name of lm-eval's own tasks stands for, kept in the user's cache.

lm-eval reads each of its YAML files to know, which takes eight seconds of a processor in every process
that uses one of them. What it found is kept under a digest of the names, sizes and times of all these files;
what does not match is read again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from sparsity_atlas import cli
from sparsity_atlas.files.whole import cache_folder, digest, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of a kept index, before what it holds.
_DIGEST = 64
# Files beside the YAML that say nothing of a task's settings.
_OTHERS = (".py", ".pyc", ".md")


@functools.cache
def built_in_tasks() -> dict[str, Entry]:
    """Tasks, groups and tags of the installed lm-eval by their names, as its own index has them."""
    return index_of(Path(lm_eval.tasks.__file__).parent)


def index_of(folder: Path) -> dict[str, Entry]:
    """lm-eval's index of a folder's tasks; kept, and read from where it is kept.

    Args:
        folder: with the YAML files, at any depth.
    """
    files = sorted(_states(folder))
    made_of = [importlib.metadata.version("lm-eval"), str(folder), files]
    path = cache_folder("tasks") / f"{digest(made_of)}.json"
    kept = _read(path)
    if kept is not None:
        return kept
    index: dict[str, Entry] = TaskIndex.build([folder])
    _keep(path, index)
    return index


def _states(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of each file that may be part of a task's settings."""
    for place, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(_OTHERS):
                state = os.stat(os.path.join(place, name))
                yield os.path.relpath(os.path.join(place, name), folder), *_of(state)


def _of(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns


def _keep(path: Path, index: dict[str, Entry]) -> None:
    rows = [
        [
            *(one.name, one.kind.name, None if one.yaml_path is None else str(one.yaml_path)),
            *(_plain(one.cfg), sorted(one.tags)),
        ]
        for one in index.values()
    ]
    payload = json.dumps(rows).encode()
    content = hashlib.sha256(payload).hexdigest().encode() + payload
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        for other in path.parent.glob("*.json"):
            if other != path:
                other.unlink(missing_ok=True)
    except OSError as error:
        cli.logger.info("the index of lm-eval's tasks is not kept: %s", error)


def _plain(settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings as JSON gives them back; None where it would give others, which are then read anew."""
    try:
        same: bool = json.loads(json.dumps(settings)) == settings
    except (TypeError, ValueError):
        return None
    return settings if same else None


def _read(path: Path) -> dict[str, Entry] | None:
    """What is kept; None if nothing is, or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    payload = content[_DIGEST:]
    if hashlib.sha256(payload).hexdigest().encode() != content[:_DIGEST]:
        return None
    found: dict[str, Entry] = {}
    for name, kind, place, settings, tags in json.loads(payload):
        at = None if place is None else Path(place)
        if settings is None and at is not None:
            settings = load_yaml(at, resolve_func=False)
        found[name] = Entry(name, Kind[kind], at, settings, set(tags))
    return found
