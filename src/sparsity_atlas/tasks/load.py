"""lm-eval tasks for evaluation: each loaded by itself as lm-eval would load it alone, and fingerprinted."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.tasks import local_files, yaml_tasks
from sparsity_atlas.tasks.boundary import boundary
from sparsity_atlas.tasks.built_in.index import built_in_tasks
from sparsity_atlas.tasks.code import surroundings
from sparsity_atlas.tasks.error_messages import RUNS_CODE, close
from sparsity_atlas.tasks.factory import (
    LocalFactory,
    fresh_transforms,
    kept_by_content,
    read_together,
)
from sparsity_atlas.tasks.identity import code_digest, leaf_identity
from sparsity_atlas.tasks.loaded import LoadedTask, RandomState, code_allowed, seed_as_lm_eval
from sparsity_atlas.tasks.modules import OwnModules
from sparsity_atlas.tasks.reported_metrics import check_found

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks._index import Entry


# Keys of a YAML that say where it stands among others: lm-eval has read them before anything is replaced.
_PLACING = ("include", "task", "group", "tag", "task_list", "class")


def load_tasks(
    entries: dict[str, dict[str, Any]],
    seed: int,
    unusable: Callable[[str, str], None] | None = None,
) -> dict[str, LoadedTask]:
    """Build the tasks of a configuration, each by itself: the others and their order change nothing.

    Args:
        entries: entries of the configuration's `tasks` (keys as in `schema.TaskEntry`).
        seed: of few-shot draws, and of what a task draws while it is loaded.
        unusable: called with the name of a task whose data cannot be fetched, and why; the task is left
            out. Without it, the first such task is an error.

    Returns:
        All tasks; one that cannot be loaded, or has no documents, with a problem.

    Raises:
        AtlasError: the Hub does not give a data set.
    """
    gc.unfreeze()  # requests of tasks that were loaded before
    loaded = {}
    for name, entry in entries.items():
        try:
            loaded[name] = _load(name, entry, seed)
        except TaskFailure as failure:
            limits = entry.get("limit"), entry.get("cluster")
            identity = {"problem": str(failure)}
            lm_eval_name = entry.get("task", name)
            nothing: dict[str, Any] = {"tasks": {}}
            loaded[name] = LoadedTask(name, lm_eval_name, nothing, *limits, identity, str(failure))
        except AtlasError as error:
            if unusable is None:
                raise
            unusable(name, str(error).removeprefix(f"tasks.{name}: "))
    return loaded


def _load(name: str, entry: dict[str, Any], seed: int) -> LoadedTask:
    lm_eval_name = entry.get("task", name)
    _check_override(entry.get("override") or {})
    index = _index(entry, lm_eval_name)
    files = local_files.find(entry.get("include"), lm_eval_name, entry.get("override"))
    modules = OwnModules(files.code)
    limit, cluster = entry.get("limit"), entry.get("cluster")
    allow_code = entry.get("allow_code", False)
    with (
        code_allowed(allow_code),
        boundary(name, "cannot be loaded", modules),
        kept_by_content(path for path in files.data | files.code if path.suffix != ".py"),
        fresh_transforms(files.code),
        read_together(),
    ):
        seed_as_lm_eval(seed)
        factory = LocalFactory(allow_code=allow_code)
        built = factory.build(
            index[lm_eval_name], overrides=entry.get("override") or None, registry=dict(index)
        )
        contents = TaskManager(include_defaults=False).load(built)
        drawn = RandomState.now()
        for leaf in contents["tasks"].values():
            if getattr(leaf, "UNSAFE_CODE", False) and not allow_code:
                raise TaskFailure(f"'{leaf.task_name}' {RUNS_CODE}")
            check_found(leaf)
            leaf.set_config(key="num_fewshot", value=_shots(leaf, entry.get("num_fewshot")))
            _keep_documents(leaf)
        documents = {
            leaf.task_name: list(islice(leaf.eval_docs, limit))
            for leaf in contents["tasks"].values()
        }
        leaves = {
            leaf.task_name: leaf_identity(leaf, documents[leaf.task_name])
            for leaf in contents["tasks"].values()
        }
    empty = [name for name, leaf in contents["tasks"].items() if len(leaf.eval_docs) == 0]
    if empty or not contents["tasks"]:
        raise TaskFailure(f"'{(empty or [lm_eval_name])[0]}' has no documents")
    if files.computed:
        cli.logger.info(
            "tasks.%s: %s reads or imports by names that it computes: its requests are not kept, and "
            "Snakemake notices edits of the files beside it only",
            *(name, ", ".join(sorted(path.name for path in files.computed))),
        )
    if files.unsteady:
        cli.logger.info(
            "tasks.%s: %s asks for the time, the machine or chance without a seed: its requests are not "
            "kept, and another run may have others",
            *(name, ", ".join(sorted(path.name for path in files.unsteady))),
        )
    variables = surroundings.values(files.variables)
    budget = entry.get("max_gen_toks")
    put = entry.get("inserted")
    inserted = put.get("text", "/ ") * put.get("times", 1) if put else ""
    identity = {
        "limit": limit,
        "cluster": cluster,
        **({"max_gen_toks": budget} if budget else {}),
        **({"inserted": inserted} if inserted else {}),
        "seed": seed,
        "code": code_digest(files.code | modules.files()),
        "leaves": leaves,
        **({"variables": variables} if variables else {}),
    }
    return LoadedTask(
        *(name, lm_eval_name, contents, limit, cluster, identity),
        documents=documents,
        modules=modules,
        drawn=drawn,
        unfollowed=bool(files.computed | files.unsteady),
        allow_code=allow_code,
        max_gen_toks=budget,
        inserted=inserted,
    )


def _index(entry: dict[str, Any], lm_eval_name: str) -> dict[str, Entry]:
    """The tasks that an entry may name: those of its own folder, then lm-eval's.

    Raises:
        TaskFailure: no such folder or task.
    """
    include = entry.get("include")
    if include is not None and not os.path.isdir(include):
        raise TaskFailure(f"include: {include}: no such folder")
    own: dict[str, Entry] = {}
    if include is not None:
        own = TaskIndex.build([Path(include)])
        if lm_eval_name in own and yaml_tasks.members(include, lm_eval_name) <= own.keys():
            return own
    index = {**built_in_tasks(), **own}
    if lm_eval_name not in index:
        if include is not None:
            _check_readable(Path(include), lm_eval_name)
        raise TaskFailure(f"lm-eval has no task '{lm_eval_name}'{close(lm_eval_name, index)}")
    return index


def _check_readable(folder: Path, name: str) -> None:
    """Say why a YAML file that seems to have a task cannot be read; lm-eval passes over it.

    Raises:
        TaskFailure: names the file.
    """
    says = re.compile(rf"^(task|group): *['\"]?{re.escape(name)}['\"]? *(#.*)?$", re.MULTILINE)
    for path in TaskIndex._iter_yaml_files(folder):
        if not says.search(path.read_text(encoding="utf-8", errors="replace")):
            continue
        try:
            TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, {})
        except Exception as error:  # noqa: BLE001 (lm-eval passes over any)
            raise TaskFailure(f"{path}: {type(error).__name__}: {error}") from None


def _check_override(override: dict[str, Any]) -> None:
    """Refuse what would have no effect, or another one than in a YAML of lm-eval.

    Raises:
        TaskFailure: names the key.
    """
    instead = (
        "write a YAML of your own for that, which may `include` the task's, and name its folder"
    )
    for key in _PLACING:
        if key in override:
            raise TaskFailure(f"override: {key}: it cannot be replaced; {instead} by `include`")
    for key, value in override.items():
        if "!function " in json.dumps(value, default=str):
            raise TaskFailure(
                f"override: {key}: `!function` is plain text in a configuration; {instead} by `include`"
            )


def _shots(task: Task, wanted: int | None) -> int:
    """Few-shot examples, by lm-eval's own rule: a task that says 0 stays at 0."""
    declared = task.get_config("num_fewshot")
    if wanted and declared == 0:
        cli.logger.info(
            "'%s': num_fewshot: %d has no effect: the task says 0, which lm-eval leaves as it is "
            "(override: {num_fewshot: %d} replaces it)",
            *(task.task_name, wanted, wanted),
        )
    return declared or 0 if wanted is None or declared == 0 else wanted


def _keep_documents(task: Task) -> None:
    """Ask a task for its documents no more: it may draw at random each time, or process them anew."""
    documents = task.task_docs if hasattr(task, "task_docs") else task.eval_docs
    if not hasattr(documents, "__len__"):
        documents = list(documents)
    split = "test_docs" if task.has_test_docs() else "validation_docs"
    setattr(task, split, lambda: documents)
