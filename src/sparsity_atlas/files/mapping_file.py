"""A YAML or JSON file that holds a mapping: what is wrong with it, before anybody asks what its keys mean.

Snakemake reads configurations before it reads the rules. It ends in a traceback where one is no text, does
not say where one is no YAML, and takes the last of keys that stand twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sparsity_atlas.errors import AtlasError

# Of libyaml where it is there: each job of a run reads its configuration again.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_file(path: Path) -> None:
    """See that a file holds a mapping whose keys stand once.

    Raises:
        AtlasError: it is no text in UTF-8, neither YAML nor JSON, no mapping, or has a key twice.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AtlasError(
            f"{path}: line {line}: byte 0x{content[error.start]:02x} is no text in UTF-8; save it as UTF-8"
        ) from None
    try:
        if _is_json(text, path):
            return
        top = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise AtlasError(f"{path}: {_where(error)}") from None
    except RecursionError:
        raise AtlasError(f"{path}: no YAML: exceeded maximum nesting depth") from None
    if not isinstance(top, yaml.MappingNode):
        kind = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}.get(type(top))
        raise AtlasError(f"{path}: a mapping is wanted, found {kind or 'nothing'}")
    if any(key.value == "__use_yte__" for key, _ in top.value):
        return  # a template, whose branches may name a key each
    for key, first, again in _doubles(top):
        raise AtlasError(f"{path}: line {again}: '{key}' stands there twice, first in line {first}")


def _is_json(text: str, path: Path) -> bool:
    """Whether it is a mapping in JSON, which may have tabs where YAML may not.

    Raises:
        AtlasError: it has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        names = [name for name, _ in pairs]
        if len(found) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise AtlasError(f"{path}: '{double}' stands twice in one mapping")
        return found

    try:
        return isinstance(json.loads(text, object_pairs_hook=once), dict)
    except (ValueError, RecursionError):
        return False


def _where(error: yaml.YAMLError) -> str:
    """A finding of the YAML parser in one line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}no YAML: {problem}"


def _doubles(top: yaml.Node) -> Iterator[tuple[str, int, int]]:
    """Each key that stands twice in a mapping, with the lines of both, counted from 1."""
    waiting, seen = [top], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias, which may lead to itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                waiting.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if key.value in lines:
                    yield key.value, lines[key.value], line
                lines[key.value] = line
