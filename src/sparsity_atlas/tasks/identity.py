"""What a loaded task is: its settings, its code and its documents, the same in each process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.files.whole import canonical, digest, file_digest

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Where the data lie is no part of what they are; their content counts.
_PLACES = {"dataset_kwargs", "metadata"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def leaf_identity(task: Task, documents: list[Any]) -> dict[str, str]:
    """Digests of a task's configuration, with the code that it names, and of the documents that it uses.

    Args:
        task: as lm-eval loaded it.
        documents: that are evaluated.
    """
    config = {
        one.name: getattr(task.config, one.name)
        for one in fields(task.config)
        if one.name not in _PLACES
    }
    if os.path.exists(str(config.get("dataset_path"))):
        del config["dataset_path"]
    shots = _shots(task) if task.get_config("num_fewshot") else ()
    content = hashlib.sha256()
    for document in itertools.chain(documents, shots):
        content.update(json.dumps(document, sort_keys=True, default=describe).encode())
    return {
        "config": digest(describe([type(task), config])),
        "documents": content.hexdigest(),
    }


def code_digest(files: Iterable[Path]) -> str:
    """Digest of files by their contents, wherever they lie."""
    return digest(sorted({file_digest(path) for path in files if path.is_file()}))


def _shots(task: Task) -> Iterable[Any]:
    """The examples that few-shot draws are from, as the sampler has them."""
    sampler = getattr(task, "sampler", None)
    return sampler.df if sampler is not None else task.fewshot_docs() or ()


def describe(value: Any) -> Any:
    """A value of a task's configuration for JSON, without an address: that is another in each process.

    A function is its place in a file, the file's content, and what it holds: arguments that were fixed,
    variables around it, the object that it belongs to.
    """
    return _describe(value, ())


def _describe(value: Any, inside: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return repr(value)
    if id(value) in inside:
        return "..."
    inner = functools.partial(_describe, inside=(*inside, id(value)))
    if isinstance(value, dict):
        pairs = ((canonical(inner(key)), inner(one)) for key, one in value.items())
        return {key: one for key, one in pairs if one is not None}
    if isinstance(value, list | tuple):
        return [inner(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((inner(one) for one in value), key=canonical)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, functools.partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if inspect.ismethod(value):
        return ["method", _mark(value.__func__), inner(value.__self__)]
    if inspect.isfunction(value):
        if hasattr(value, "__wrapped__"):
            return inner(value.__wrapped__)
        around = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        defaults = [value.__defaults__, value.__kwdefaults__]
        return ["function", _mark(value), inner(around), inner(defaults)]
    if inspect.isclass(value) or inspect.isbuiltin(value):
        return ["code", _mark(value)]
    shown: object = type(value).__repr__
    if shown is object.__repr__ or is_dataclass(value):
        return ["object", _mark(type(value)), inner(getattr(value, "__dict__", None))]
    return ["other", type(value).__qualname__, _ADDRESS.sub("", repr(value))]


def _is_full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return False
    return True


@functools.lru_cache
def _known(path: str, _state: tuple[int, int]) -> str:
    return file_digest(Path(path))


def _mark(code: Any) -> list[Any]:
    """Which function or class this is: its name, its line, and the content of its file."""
    name = getattr(code, "__qualname__", type(code).__qualname__)
    place = getattr(code, "__code__", None)
    try:
        file = place.co_filename if place is not None else inspect.getsourcefile(code)
    except TypeError:  # built into Python
        file = None
    if file is None or not os.path.isfile(file):
        return [name]
    state = os.stat(file)
    return [name, place and place.co_firstlineno, _known(file, (state.st_mtime_ns, state.st_size))]
