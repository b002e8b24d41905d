"""The local files that a task is made of, found without loading lm-eval.

Snakemake asks for their digest when it builds the DAG, so that an edited task file reruns what it
feeds. The evaluation itself goes further and fingerprints the documents that it really sees and the
modules that were really imported.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsity_atlas.files.whole import digest, file_digest
from sparsity_atlas.tasks.code import surroundings
from sparsity_atlas.tasks.code.follow import reach
from sparsity_atlas.tasks.code.own_modules import files_below, import_roots, module_files
from sparsity_atlas.tasks.yaml_tasks import OWN_CODE, entries_of

# Keys of a task's YAML whose texts say where its documents are: files, folders and patterns.
_DATA = ("dataset_path", "dataset_kwargs", "metadata")


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
    entries = entries_of(include, name)
    folders = list(dict.fromkeys(path.parent for one in entries for path in one.chain))
    starts: list[Path] = []
    for entry in entries:
        found.settings |= set(entry.chain)
        for path, content in entry.chain.items():
            places = [entry.path.parent, path.parent]
            starts += _sort(
                content, places, found, own=any(key in entry.content for key in OWN_CODE)
            )
    own = any(key in entry.content for entry in entries for key in OWN_CODE)
    starts += _sort(override or {}, folders, found, own=own)
    reached = reach(starts, [*folders, *([Path(include)] if include else []), *import_roots()])
    found.code |= reached.files
    found.computed |= reached.computed
    found.unsteady |= reached.unsteady
    found.variables |= reached.variables
    found.data -= found.code
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
