"""lm-eval tasks for evaluation: built once, with local data files found, and fingerprinted."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.hub import with_data
from sparsity_atlas.store import digest, file_digest

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks._index import Entry


@dataclass(frozen=True)
class LoadedTask:
    """An entry of the configuration's tasks, ready for lm-eval.

    Attributes:
        name: its key in the configuration.
        lm_eval_name: task or group in lm-eval.
        contents: what `lm_eval.evaluator.evaluate` takes: leaf tasks, groups.
        limit: first so many documents of each leaf, or None.
        cluster: document field that names items made alike, or None.
        identity: JSON-able description of the task and digest of its documents.
        problem: why it cannot be evaluated on any model, or None.
    """

    name: str
    lm_eval_name: str
    contents: dict[str, Any]
    limit: int | None
    cluster: str | None
    identity: dict[str, Any]
    problem: str | None = None

    @property
    def leaves(self) -> dict[str, Task]:
        """lm-eval's tasks by name; one unless this is a group."""
        return self.contents["tasks"]

    @property
    def data(self) -> dict[str, str]:
        """The commit of each Hub data set that it reads."""
        configs = [leaf.config for leaf in self.leaves.values()]
        options = {config.dataset_path: config.dataset_kwargs or {} for config in configs}
        return {path: one["revision"] for path, one in options.items() if "revision" in one}


class _LocalFiles(TaskFactory):
    """lm-eval's factory, which also finds a task's data files beside its YAML, and pins Hub data.

    lm-eval looks for files from the working directory, so a task could only be run from one place.
    """

    def _load_full_config(
        self, entry: Entry, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        options = config.get("dataset_kwargs")
        if entry.yaml_path and isinstance(options, dict) and "data_files" in options:
            files = _beside(Path(entry.yaml_path).parent, options["data_files"])
            config["dataset_kwargs"] = {**options, "data_files": files}
        return with_data(config)


def _beside(folder: Path, files: Any) -> Any:
    """Resolve the data files that exist in `folder`; leave the rest (absolute, or from the cwd)."""
    if isinstance(files, dict):
        return {split: _beside(folder, value) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(folder, value) for value in files]
    return str((folder / files).resolve()) if (folder / files).exists() else files


def _manager(include: list[str], *, defaults: bool) -> TaskManager:
    manager = TaskManager(include_path=include or None, include_defaults=defaults)
    manager._factory = _LocalFiles()
    return manager


def load_tasks(
    entries: dict[str, dict[str, Any]],
    seed: int,
    unusable: Callable[[str, str], None] | None = None,
) -> dict[str, LoadedTask]:
    """Build the tasks of a configuration.

    Args:
        entries: entries of the configuration's `tasks` (keys as in `config.TaskEntry`).
        seed: of few-shot draws.
        unusable: called with the name of a task that cannot be loaded, and why; the task is left out.
            Without it, the first such task is an error.

    Raises:
        AtlasError: an unknown task, or data that cannot be loaded. A task without documents is loaded,
            with a problem.
    """
    include = list(
        dict.fromkeys(entry["include"] for entry in entries.values() if "include" in entry)
    )
    manager = _manager(include, defaults=False)
    names = {name: entry.get("task", name) for name, entry in entries.items()}
    if any(name not in manager.task_index for name in names.values()):
        # Eight seconds: lm-eval reads every YAML of its own. Only for runs that use one of them.
        manager = _manager(include, defaults=True)
    loaded = {}
    for name, entry in entries.items():
        try:
            loaded[name] = _load(manager, name, names[name], entry, seed)
        except AtlasError as error:
            if unusable is None:
                raise
            unusable(name, str(error).removeprefix(f"tasks.{name}: "))
    return loaded


def _load(
    manager: TaskManager, name: str, lm_eval_name: str, entry: dict[str, Any], seed: int
) -> LoadedTask:
    if "include" in entry and not Path(entry["include"]).is_dir():
        raise AtlasError(f"tasks.{name}: include: {entry['include']}: no such folder")
    index = manager.task_index
    if lm_eval_name not in index:
        close = difflib.get_close_matches(lm_eval_name, index, n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise AtlasError(f"tasks.{name}: lm-eval has no task '{lm_eval_name}'{hint}")
    try:
        built = manager._factory.build(
            index[lm_eval_name], overrides=entry.get("override") or None, registry=index
        )
        contents = manager.load(built)
    except StopIteration:  # of `datasets`, at an empty file
        contents = {"tasks": {}}
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise AtlasError(f"tasks.{name}: cannot load '{lm_eval_name}': {_reason(error)}") from None
    problem = None if contents["tasks"] else f"'{lm_eval_name}' has no documents"
    for leaf in contents["tasks"].values():
        leaf.set_config(key="num_fewshot", value=_shots(leaf, entry.get("num_fewshot")))
        try:
            documents = len(leaf.eval_docs)
        except (KeyError, ValueError) as error:
            raise AtlasError(f"tasks.{name}: '{leaf.task_name}': {_reason(error)}") from None
        if documents == 0:
            problem = f"'{leaf.task_name}' has no documents"
    limit = entry.get("limit")
    identity = {
        "limit": limit,
        "cluster": entry.get("cluster"),
        "seed": seed,
        "leaves": {leaf.task_name: _identity(leaf, limit) for leaf in contents["tasks"].values()},
    }
    cluster = entry.get("cluster")
    return LoadedTask(name, lm_eval_name, contents, limit, cluster, identity, problem)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"its data have no split or field {error}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shots(task: Task, wanted: int | None) -> int:
    """Few-shot examples, by lm-eval's own rule: a task that says 0 stays at 0."""
    declared = task.get_config("num_fewshot")
    return declared or 0 if wanted is None or declared == 0 else wanted


def _identity(task: Task, limit: int | None) -> dict[str, str]:
    """Digests of a task's configuration, of its own code and of the documents that it will use."""
    config = task.dump_config()
    # Where the data lie is no part of what they are; their content is digested below.
    for key in ("dataset_kwargs", "metadata"):
        config.pop(key, None)
    documents = hashlib.sha256()
    shots = task.fewshot_docs() if task.get_config("num_fewshot") else ()
    for document in [*islice(task.eval_docs, limit), *(shots or ())]:
        documents.update(json.dumps(document, sort_keys=True, default=repr).encode())
    return {
        "config": digest(json.loads(json.dumps(config, default=_name))),
        "code": digest(sorted({file_digest(path) for path in _source_files(task)})),
        "documents": documents.hexdigest(),
    }


def _name(value: Any) -> str:
    """A function by its name: its repr holds an address, which is another one in each process."""
    return value.__qualname__ if hasattr(value, "__qualname__") else repr(value)


def _source_files(task: Task) -> set[Path]:
    """Python files of the functions that a task's configuration names, and of its own class."""
    code = [*_functions(task.config), type(task)]
    files = (inspect.getsourcefile(one) for one in code if inspect.getmodule(one) is not None)
    return {Path(file) for file in files if file}


def _functions(value: Any) -> Iterator[Any]:
    if inspect.isfunction(value):
        yield value
    elif is_dataclass(value):
        for one in fields(value):
            yield from _functions(getattr(value, one.name))
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _functions(one)
