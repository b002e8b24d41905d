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
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AtlasError(f"tasks: {path}: not YAML: {error}") from None
    return content if isinstance(content, dict) else {}


def override_digest(override: dict[str, Any]) -> str:
    """Digest of the local files that an `override` names; an empty string if there are none."""
    files = {
        text: Path(text) for text in _strings(override) if len(text) < 500 and "\n" not in text
    }
    digests = {text: file_digest(path) for text, path in files.items() if path.is_file()}
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
    while "include" in content:
        path = path.parent / content["include"]
        if not path.is_file() or path in files:
            break
        files.add(path)
        content = {**_read(path), **{k: v for k, v in content.items() if k != "include"}}
    members = content.get("task")
    for member in members if isinstance(members, list) else []:
        child = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(child, str):
            files |= _files(include, child, seen)
    files |= {file for text in _strings(content) for file in _named_files(path.parent, text)}
    return files


def _strings(value: Any) -> list[str]:
    """Every string inside a YAML value."""
    if isinstance(value, str):
        return [value]
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return [text for child in children for text in _strings(child)]


def _named_files(folder: Path, text: str) -> list[Path]:
    """The file that a string of a task's YAML names: a data file, or a module by `!function`."""
    if text.startswith("!function "):
        candidates = [folder / f"{text.removeprefix('!function ').rpartition('.')[0]}.py"]
    elif "\n" in text or len(text) > 500:
        candidates = []
    else:
        candidates = [folder / text, Path(text)]
    return [path for path in candidates[:1] if path.is_file()] or [
        path for path in candidates[1:] if path.is_file()
    ]
