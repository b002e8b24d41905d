"""Tasks and groups in the YAML of a folder, found by lm-eval's rules, but without loading it."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsity_atlas.errors import AtlasError

# Bytes; lm-eval's largest is a hundredth of it.
LARGEST = 2**20
# The output type of tasks that are answered by generated text.
GENERATED = "generate_until"
# That of whole texts, the only one that has a loss.
ROLLING = "loglikelihood_rolling"
# With one of these, code of the task's own does what it likes with the data.
OWN_CODE = ("custom_dataset", "class")


class _Loader(yaml.SafeLoader):
    """Safe YAML that keeps lm-eval's `!function module.name` as text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


@dataclass(frozen=True)
class Entry:
    """A YAML file of a task or group: its keys with those that it includes, and all files of them."""

    path: Path
    content: dict[str, Any]
    chain: dict[Path, dict[str, Any]]


@functools.cache
def entries(include: Path) -> dict[str, list[Entry]]:
    """The entry of each task and group below a folder, and those of each tag, by lm-eval's rules."""
    found: dict[str, list[Entry]] = {}
    tagged: dict[str, list[Entry]] = {}
    for path in sorted(include.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        if {"__pycache__", ".ipynb_checkpoints"} & set(path.parts):
            continue
        chain: dict[Path, dict[str, Any]] = {}
        content = _with_included(path, chain)
        entry = Entry(path, content, chain)
        name = content.get("group") if "class" not in content else None
        name = name or content.get("task")
        if not isinstance(name, str):
            continue
        found.setdefault(name, [entry])
        for tag in _listed(content.get("tag")):
            tagged.setdefault(tag, []).append(entry)
    return {**tagged, **found}


def _with_included(path: Path, chain: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    if path in chain:
        return {}
    content = chain[path] = _read(path)
    merged: dict[str, Any] = {}
    for name in _listed(content.get("include")):
        if os.path.isfile(path.parent / name):
            merged |= _with_included(path.parent / name, chain)
    return {**merged, **{key: value for key, value in content.items() if key != "include"}}


def _listed(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _read(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise AtlasError(f"tasks: {path}: {size:,} bytes; at most {LARGEST:,} are read as YAML")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    # A ValueError of a constructor: a date of month 13, a number without digits.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AtlasError(f"tasks: {path}: not YAML: {error}") from None
    return content if isinstance(content, dict) else {}


def entries_of(include: str | None, name: str) -> list[Entry]:
    """The entries of a task of a folder, of a group and all its members, or of a tag.

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    return _members(entries(Path(include)), name, set()) if include is not None else []


def members(include: str, name: str) -> set[str]:
    """Names of a group's members, and of those of its groups, that are not written out in it.

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    return {
        member
        for one in entries_of(include, name)
        for member in _named_members(one.content.get("task"), written_out=False)
    }


def output_types(
    include: str | None, name: str, override: dict[str, Any] | None = None
) -> set[str] | None:
    """What lm-eval asks a model for in a task of a folder, and in a group's members.

    Args:
        include: folder of the task's YAML; None for a task of lm-eval's own.
        name: the task, group or tag.
        override: keys that replace those of its YAML.

    Returns:
        Values of `output_type`; None where YAML does not say it of all of them: of tasks with code of their
        own, and of those of lm-eval's own that `_of_lm_eval` does not find.

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    known = entries(Path(include)) if include is not None else {}
    found = set()
    for entry in _members(known, name, set()) or _of_lm_eval(name):
        members = entry.content.get("task")
        if isinstance(members, list):
            # Settings that stand in the group itself may be any.
            if not all(isinstance(one, str) and one in known for one in members):
                return None
        elif any(key in entry.content for key in OWN_CODE):
            return None
        else:
            # Where nothing is said lm-eval generates.
            found.add(str({**entry.content, **(override or {})}.get("output_type", GENERATED)))
    return found or None


def _of_lm_eval(name: str) -> list[Entry]:
    """A task of lm-eval's own whose folder bears the first words of its name, as most do.

    To read all 14,000 files for the others would take each start of Snakemake a second.
    """
    spec = importlib.util.find_spec("lm_eval")
    places = spec.submodule_search_locations if spec is not None else None
    words = name.split("_")
    for root in places or ():
        for count in range(len(words), 0, -1):
            folder = Path(root, "tasks", "_".join(words[:count]))
            for path in (folder / f"{name}.yaml", folder / "default.yaml"):
                if os.path.isfile(path):  # which takes a name that no file can have for none
                    chain: dict[Path, dict[str, Any]] = {}
                    content = _with_included(path, chain)
                    if content.get("task") == name and "group" not in content:
                        return [Entry(path, content, chain)]
    return []


def _members(catalogue: dict[str, list[Entry]], name: str, seen: set[str]) -> list[Entry]:
    """The entries of a task, of a group and all its members, or of a tag."""
    if name in seen:
        return []
    seen.add(name)
    found = []
    for entry in catalogue.get(name, []):
        found.append(entry)
        for member in _named_members(entry.content.get("task")):
            found += _members(catalogue, member, seen)
    return found


def _named_members(members: Any, *, written_out: bool = True) -> list[str]:
    """Tasks and groups that a group's list names, by name or with settings of their own.

    Args:
        members: the value of its key `task`.
        written_out: whether those count that the list gives all settings of.
    """
    found: list[str] = []
    seen: set[int] = set()
    waiting: list[Any] = [members] if isinstance(members, list) else []
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, list | dict) and id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, list):
                waiting += one
            elif written_out or not ({"dataset_path", *OWN_CODE} & one.keys()):
                of_its_own = isinstance(one.get("task"), list) and not written_out
                waiting += [one.get("task"), None if of_its_own else one.get("group")]
    return found
