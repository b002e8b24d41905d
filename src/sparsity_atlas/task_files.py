"""The files that a local task is made of, found without loading lm-eval.

Snakemake asks for their digest when it builds the DAG, so that an edited task file reruns what it
feeds. The evaluation itself goes further and fingerprints the documents that it really sees.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import yaml

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.store import digest, file_digest

# Bytes; lm-eval's largest is a hundredth of it.
LARGEST = 2**20


class _Loader(yaml.SafeLoader):
    """Safe YAML that keeps lm-eval's `!function module.name` as text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


@functools.cache
def _catalogue(include: Path) -> dict[str, Path]:
    """YAML file of each task, group and tag member below a folder."""
    found: dict[str, Path] = {}
    for path in sorted(include.glob("**/*.yaml")):
        content = _read(path)
        for key in ("group", "task"):
            if isinstance(content.get(key), str):
                found.setdefault(content[key], path)
                break
    return found


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


def override_digest(override: dict[str, Any]) -> str:
    """Digest of the local files that an `override` names; an empty string if there are none."""
    files = [text for text in _strings(override) if os.path.isfile(text)]
    digests = {text: file_digest(Path(text)) for text in files}
    return digest(digests) if digests else ""


def files_digest(include: str | None, name: str) -> str:
    """Digest of a task's YAML, the YAML it includes, its data files and helper code.

    Args:
        include: folder of the task's YAML; None for a task of lm-eval's own.
        name: the task or group.

    Returns:
        64 hex digits; an empty string if the folder does not have the task (lm-eval may).

    Raises:
        AtlasError: a YAML file of the folder cannot be read.
    """
    if include is None:
        return ""
    files = _files(Path(include), name, set())
    # By the place beside the YAML: seen from another working directory, the files are the same.
    return (
        digest({os.path.relpath(path, include): file_digest(path) for path in files})
        if files
        else ""
    )


def data_files(include: str | None, name: str) -> set[Path]:
    """The local files of a task, its data among them, as absolute paths."""
    return set() if include is None else {p.resolve() for p in _files(Path(include), name, set())}


def _files(include: Path, name: str, seen: set[str]) -> set[Path]:
    path = _catalogue(include).get(name)
    if path is None or name in seen:
        return set()
    seen.add(name)
    files = {path}
    content = _read(path)
    while isinstance(content.get("include"), str):
        path = path.parent / content["include"]
        if not os.path.isfile(path) or path in files:
            break
        files.add(path)
        content = {**_read(path), **{k: v for k, v in content.items() if k != "include"}}
    members = content.get("task")
    for member in members if isinstance(members, list) else []:
        child = member
        if isinstance(member, dict):
            child = member.get("task") or member.get("group")
        if isinstance(child, str):
            files |= _files(include, child, seen)
    files |= {file for text in _strings(content) for file in _named_files(path.parent, text)}
    return files


def _strings(value: Any) -> list[str]:
    """Every string inside a YAML value, whose aliases may repeat and even contain themselves."""
    found: list[str] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, dict | list) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one
    return found


def _named_files(folder: Path, text: str) -> list[Path]:
    """The file that a string of a task's YAML names: a data file, or a module by `!function`."""
    if text.startswith("!function "):
        candidates = [folder / f"{text.removeprefix('!function ').rpartition('.')[0]}.py"]
    else:
        candidates = [folder / text, Path(text)]
    # os.path, unlike Path.is_file, takes a name that no file can have for that of no file.
    return next(([path] for path in candidates if os.path.isfile(path)), [])
