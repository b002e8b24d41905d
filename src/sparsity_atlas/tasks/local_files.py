"""The local files that a task is made of, found without loading lm-eval.

Snakemake asks for their digest when it builds the DAG, so that an edited task file reruns what it
feeds. The evaluation itself goes further and fingerprints the documents that it really sees and the
modules that were really imported.
"""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import digest, file_digest
from sparsity_atlas.tasks.code import surroundings
from sparsity_atlas.tasks.code.follow import reach
from sparsity_atlas.tasks.code.own_modules import files_below, import_roots, module_files

# Bytes; lm-eval's largest is a hundredth of it.
LARGEST = 2**20
# Keys of a task's YAML whose texts say where its documents are: files, folders and patterns.
_DATA = ("dataset_path", "dataset_kwargs", "metadata")
# The output type of tasks that are answered by generated text.
GENERATED = "generate_until"
# With one of these, code of the task's own does what it likes with the data.
_OWN = ("custom_dataset", "class")


@dataclass
class TaskFiles:
    """The local files of a task.

    Attributes:
        settings: its YAML, that of its group, and what they include.
        data: what its documents are read from.
        code: its Python code, what that imports and names, and other files that its YAML names.
        computed: code that reads or imports by names that it computes, so that not all is known.
        unsteady: code that asks for the time, the machine or chance.
        variables: environment variables that code asks for.
    """

    settings: set[Path] = field(default_factory=set)
    data: set[Path] = field(default_factory=set)
    code: set[Path] = field(default_factory=set)
    computed: set[Path] = field(default_factory=set)
    unsteady: set[Path] = field(default_factory=set)
    variables: set[str] = field(default_factory=set)

    def all(self) -> set[Path]:
        """Every file."""
        return self.settings | self.data | self.code


class _Loader(yaml.SafeLoader):
    """Safe YAML that keeps lm-eval's `!function module.name` as text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


@dataclass(frozen=True)
class _Entry:
    """A YAML file of a task or group: its keys with those that it includes, and all files of them."""

    path: Path
    content: dict[str, Any]
    chain: dict[Path, dict[str, Any]]


@functools.cache
def _catalogue(include: Path) -> dict[str, list[_Entry]]:
    """The entry of each task and group below a folder, and those of each tag, by lm-eval's rules."""
    found: dict[str, list[_Entry]] = {}
    tagged: dict[str, list[_Entry]] = {}
    for path in sorted(include.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        if {"__pycache__", ".ipynb_checkpoints"} & set(path.parts):
            continue
        chain: dict[Path, dict[str, Any]] = {}
        content = _with_included(path, chain)
        entry = _Entry(path, content, chain)
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


def files_digest(include: str | None, name: str, override: dict[str, Any] | None = None) -> str:
    """Digest of all local files of a task, and of the environment variables that it asks for; see `find`.

    Returns:
        64 hex digits; an empty string if there are none.

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    found = find(include, name, override)
    # By the place beside the YAML: seen from another working directory, the files are the same.
    places = {os.path.relpath(path, include or os.curdir): _digest(path) for path in found.all()}
    variables = surroundings.values(found.variables)
    return digest([places, variables] if variables else places) if places else ""


def variables(entries: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """Values of the environment variables that tasks ask for, as `surroundings.values` has them.

    Args:
        entries: of the configuration's `tasks`.

    Raises:
        AtlasError: a YAML file of a folder cannot be read.
    """
    found = (
        find(entry.get("include"), entry.get("task", name), entry.get("override"))
        for name, entry in entries.items()
    )
    return surroundings.values({name for one in found for name in one.variables})


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:  # who needs the file will say so
        return str(error.strerror)


def find(include: str | None, name: str, override: dict[str, Any] | None = None) -> TaskFiles:
    """The local files of a task, or of a group with its members.

    Args:
        include: folder of the task's YAML; None for a task of lm-eval's own.
        name: the task, group or tag.
        override: keys that replace those of its YAML.

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    found = TaskFiles()
    catalogue = _catalogue(Path(include)) if include is not None else {}
    entries = _members(catalogue, name, set())
    folders = list(dict.fromkeys(path.parent for one in entries for path in one.chain))
    starts: list[Path] = []
    for entry in entries:
        found.settings |= set(entry.chain)
        for path, content in entry.chain.items():
            places = [entry.path.parent, path.parent]
            starts += _sort(content, places, found, own=any(key in entry.content for key in _OWN))
    own = any(key in entry.content for entry in entries for key in _OWN)
    starts += _sort(override or {}, folders, found, own=own)
    reached = reach(starts, [*folders, *([Path(include)] if include else []), *import_roots()])
    found.code |= reached.files
    found.computed |= reached.computed
    found.unsteady |= reached.unsteady
    found.variables |= reached.variables
    found.data -= found.code
    return found


def members(include: str, name: str) -> set[str]:
    """Names of a group's members, and of those of its groups, that are not written out in it.

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    entries = _members(_catalogue(Path(include)), name, set())
    return {
        member
        for one in entries
        for member in _named_members(one.content.get("task"), written_out=False)
    }


def output_types(
    include: str | None, name: str, override: dict[str, Any] | None = None
) -> set[str] | None:
    """What lm-eval asks a model for in a task of a folder, and in a group's members.

    Args:
        include: see `find`.
        name: see `find`.
        override: see `find`.

    Returns:
        Values of `output_type`; None where the folder's YAML does not say it of all of them: tasks of
        lm-eval's own, and such with code of their own.

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    catalogue = _catalogue(Path(include)) if include is not None else {}
    entries = _members(catalogue, name, set())
    found = set()
    for entry in entries:
        members = entry.content.get("task")
        if isinstance(members, list):
            # Settings that stand in the group itself may be any.
            if not all(isinstance(one, str) and one in catalogue for one in members):
                return None
        elif any(key in entry.content for key in _OWN):
            return None
        else:
            # Where nothing is said lm-eval generates.
            found.add(str({**entry.content, **(override or {})}.get("output_type", GENERATED)))
    return found or None


def _members(catalogue: dict[str, list[_Entry]], name: str, seen: set[str]) -> list[_Entry]:
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
            elif written_out or not ({"dataset_path", *_OWN} & one.keys()):
                of_its_own = isinstance(one.get("task"), list) and not written_out
                waiting += [one.get("task"), None if of_its_own else one.get("group")]
    return found


def _sort(
    content: dict[str, Any], places: list[Path], found: TaskFiles, *, own: bool
) -> list[Path]:
    """Add the files that a YAML's texts name; returns those of its functions.

    Args:
        content: keys and values, those of a group's members among them.
        places: folders that names are looked for in, beside the working directory.
        found: where they are added.
        own: whether code of the task's own reads its data.
    """
    starts: list[Path] = []
    places = list(dict.fromkeys([*places, Path()]))
    for text, of_data in _texts(content):
        if text.startswith("!function "):
            module = text.removeprefix("!function ").rpartition(".")[0]
            roots = [*places, *import_roots()]
            starts += [path for path in module_files(roots, module) if path.suffix == ".py"]
            continue
        files = _named(places, text, whole=of_data)
        (found.data if of_data and not own else found.code).update(files)
    return starts


def _named(places: Iterable[Path], text: str, *, whole: bool) -> list[Path]:
    """Files that a text names, seen from some folders; with `whole`, folders and patterns as well."""
    # lm-eval's `use_prompt: file.yaml:name`.
    names = [text, text.rpartition(":")[0]] if ".yaml:" in text else [text]
    if "://" in text:
        # file:///data/a.jsonl, or zip://a.jsonl::/data/b.zip, of which the archive counts.
        names = [one.rpartition("://")[2] for one in text.split("::")]
    # os.path, unlike Path.is_file, takes a name that no file can have for that of no file.
    candidates = [place / name for place in places for name in names if name.strip("./ ") or whole]
    found = [path for path in candidates if os.path.isfile(path)]
    if whole and text:
        found += [file for path in candidates if os.path.isdir(path) for file in files_below(path)]
        for name in names:
            if not glob.has_magic(name) or "\0" in name:
                continue
            for place in places:
                pattern = os.path.join(glob.escape(str(place)), name)
                found += [
                    Path(one) for one in glob.glob(pattern, recursive=True) if os.path.isfile(one)
                ]
    return found


def _texts(content: dict[str, Any]) -> list[tuple[str, bool]]:
    """Every text inside a YAML value, and whether it says where documents are.

    Aliases may repeat and even contain themselves.
    """
    found: list[tuple[str, bool]] = []
    seen: set[tuple[int, bool]] = set()
    waiting: list[tuple[Any, bool]] = [(content, False)]
    while waiting:
        one, of_data = waiting.pop()
        if isinstance(one, str):
            found.append((one, of_data))
        elif isinstance(one, dict | list) and (id(one), of_data) not in seen:
            seen.add((id(one), of_data))
            items = one.items() if isinstance(one, dict) else ((None, inner) for inner in one)
            waiting += [(inner, of_data or key in _DATA) for key, inner in items]
    return found
