"""lm-eval's factory of tasks, which finds data beside a task's YAML and processes each split once."""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.features.features import require_decoding
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind

from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.files.whole import digest, file_digest
from sparsity_atlas.loading.hub import with_data
from sparsity_atlas.tasks.error_messages import RUNS_CODE
from sparsity_atlas.tasks.reported_metrics import check_metric_list

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

# Of a task that evaluates its first few documents no more are read than this.
TOGETHER = 1000


class LocalFactory(TaskFactory):
    """Finds a task's data beside its YAML, and pins data of the Hub.

    lm-eval looks for files from the working directory, so a task could only be run from one place. It
    also calls `process_docs` several times; what that draws at random is one draw here, as it is there
    where `datasets` keeps the first result.
    """

    def __init__(self, *, allow_code: bool) -> None:
        super().__init__()
        self._allow_code = allow_code

    def _load_full_config(
        self, entry: Entry, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        # Before its own modules are imported, which may try their metric.
        if not self._allow_code and (entry.cfg or {}).get("unsafe_code"):
            raise TaskFailure(f"'{entry.name}' {RUNS_CODE}")
        config = super()._load_full_config(entry, overrides)
        if entry.kind is Kind.TASK:
            check_kinds(config)
        if entry.kind is not Kind.GROUP:
            check_metric_list(config)
        return _prepared(config, Path(entry.yaml_path).parent if entry.yaml_path else None)


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "dataset_path": (str, "a text"),
    "target_delimiter": (str, "a text"),
    "fewshot_delimiter": (str, "a text"),
    "dataset_kwargs": (dict, "a mapping"),
    "fewshot_config": (dict, "a mapping"),
    "generation_kwargs": (dict, "a mapping"),
    "metric_list": (list, "a list"),
    "filter_list": (list, "a list"),
    "num_fewshot": (int, "a whole number"),
    "repeats": (int, "a whole number"),
}
# With one of these the task has data; without a value these are as if they were not there.
_DATA = ("dataset_path", "custom_dataset")
_MAY_BE_EMPTY = _KINDS.keys() - {"target_delimiter", "fewshot_delimiter", "repeats"}


def check_kinds(config: dict[str, Any]) -> None:
    """Refuse values of a kind that lm-eval does not expect, and stumbles over without saying where.

    Args:
        config: a task's whole configuration.

    Raises:
        TaskFailure: names the key, what was found and what would be right.
    """
    if not any(config.get(key) for key in _DATA):
        raise TaskFailure("dataset_path: expected the name of its data, found nothing")
    for key, (kind, expected) in _KINDS.items():
        value = config.get(key)
        if key not in config or (value is None and key in _MAY_BE_EMPTY):
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = "nothing" if value is None else f"'{value}'"
            raise TaskFailure(f"{key}: expected {expected}, found {shown}")
    if config.get("repeats", 1) < 1:
        raise TaskFailure(f"repeats: expected 1 or more, found {config['repeats']}")
    for one in config.get("filter_list") or ():
        steps = one.get("filter") if isinstance(one, dict) else None
        whole = isinstance(steps, list) and all(
            isinstance(step, dict) and "function" in step for step in steps
        )
        if not whole or "name" not in one:
            raise TaskFailure(
                "filter_list: expected items like {name: first, filter: [{function: take_first}]}, "
                f"found '{one}'"
            )


def _prepared(config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """A configuration whose data are named by absolute paths and commits, with those of its members."""
    config = dict(config)
    options = config.get("dataset_kwargs")
    if folder is not None:
        if isinstance(options, dict):
            found = {
                key: _beside(folder, options[key])
                for key in ("data_files", "data_dir")
                if key in options
            }
            config["dataset_kwargs"] = {**options, **found}
        path = config.get("dataset_path")
        if isinstance(path, str) and path not in _PACKAGED_DATASETS_MODULES:
            config["dataset_path"] = _beside(folder, path)
    if callable(config.get("process_docs")):
        config["process_docs"] = _once(config["process_docs"])
    shots = config.get("fewshot_config")
    if isinstance(shots, dict) and callable(shots.get("process_docs")):
        config["fewshot_config"] = {**shots, "process_docs": _once(shots["process_docs"])}
    if isinstance(config.get("task"), list):
        # A member may be a task of its own, written out in the list.
        config["task"] = [
            _prepared(one, folder) if isinstance(one, dict) else one for one in config["task"]
        ]
        # The format that members have in common, whose files each of them names.
        if config.get("dataset_path") in _PACKAGED_DATASETS_MODULES:
            return config
    return with_data(config)


def _beside(folder: Path, files: Any) -> Any:
    """Resolve the data that lie in `folder`; leave the rest (absolute, or from the cwd)."""
    if isinstance(files, dict):
        return {split: _beside(folder, value) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(folder, value) for value in files]
    if not isinstance(files, str) or not files or "://" in files:
        return files
    pattern = os.path.join(glob.escape(str(folder)), files)
    there = os.path.exists(folder / files) or (
        glob.has_magic(files) and glob.glob(pattern, recursive=True)
    )
    return str((folder / files).resolve()) if there else files


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of a split whose first answer is kept."""
    known: dict[int, tuple[Any, Any]] = {}
    source = _source(process)
    draws = [source] if source is not None and b"random" in source.read_bytes() else []

    @functools.wraps(process, updated=())
    def processed(split: Any) -> Any:
        if id(split) not in known:
            with fresh_transforms(draws):
                # The split too, so that its id stays its own.
                known[id(split)] = split, process(split)
        return known[id(split)][1]

    return processed


def _source(function: Any) -> Path | None:
    """The file of a function, also where some of its arguments were fixed."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    return Path(code.co_filename) if code and os.path.isfile(code.co_filename) else None


@contextlib.contextmanager
def kept_by_content(data: Iterable[Path]) -> Iterator[None]:
    """Have `datasets` keep its tables of local data by the content of the files.

    By itself it knows a file by its name and the time of its last change, which a copy or an archive may
    have brought along.

    Args:
        data: the files; if there are none, nothing is changed.
    """
    contents = sorted(file_digest(path) for path in data if path.is_file())
    folder = datasets.config.HF_DATASETS_CACHE
    if contents:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "sparsity-atlas", digest(contents)[:16])
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = folder


@contextlib.contextmanager
def fresh_transforms(code: Iterable[Path]) -> Iterator[None]:
    """Do anew what some code does to data, where `datasets` may keep a result that is another one.

    It knows an edit of the function that it is given, but not of one that this imports, nor what that
    reads or draws at random.

    Args:
        code: files of the code; if there are none, nothing is done anew.
    """
    code = list(code)
    enabled, folder = datasets.is_caching_enabled(), datasets.config.HF_DATASETS_CACHE
    if code:
        datasets.disable_caching()
    if any(b"from_generator" in path.read_bytes() for path in code if path.suffix == ".py"):
        # Kept by what the generator is called; until this process ends, since it is mapped into memory.
        fresh = tempfile.mkdtemp(prefix="sparsity-atlas-")
        atexit.register(shutil.rmtree, fresh, ignore_errors=True)
        datasets.config.HF_DATASETS_CACHE = Path(fresh)
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = folder
        if enabled:
            datasets.enable_caching()


def rows_of(data: datasets.Dataset) -> Iterator[dict[str, Any]] | None:
    """The rows of a data set as it gives them by itself; None where it does more than read them.

    Args:
        data: as some code has left it, with another order or another format, too.
    """
    if data.format["type"] is not None or set(data.format["columns"]) != set(data.column_names):
        return None
    if any(map(require_decoding, data.features.values())):
        return None
    tables = data.with_format("arrow").iter(TOGETHER)
    return (row for table in tables for row in table.to_pylist())


@contextlib.contextmanager
def read_together() -> Iterator[None]:
    """Have whoever goes through a data set get many rows at a time: one by one takes most of the loading.

    lm-eval lists all documents that few-shot examples could be drawn from, whether or not there are any.
    """
    one_by_one = datasets.Dataset.__iter__

    def every(data: datasets.Dataset) -> Iterator[Any]:
        found = rows_of(data)
        return one_by_one(data) if found is None else found

    datasets.Dataset.__iter__ = every
    try:
        yield
    finally:
        datasets.Dataset.__iter__ = one_by_one
