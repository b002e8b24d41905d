"""The code version of a stage: a digest of the source files that it is made of.

Snakemake does not see an edit in an imported package, so every rule names its stage's code version in
`params`, and every fingerprint holds it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sparsity_atlas.commands import COMMANDS

PACKAGE = Path(__file__).parent

# What these do reaches a stage through its arguments, never through the numbers that it computes.
_NO_SCIENCE = {
    "cli",
    "code_version",
    "commands",
    "credentials",
    "errors",
    "config.schema",
    "config.speed_settings",
    "config.study_settings",
    "config.timings",
    "config.grid",
}


@functools.cache
def code_version(stage: str, criterion_file: str | None = None) -> str:
    """Digest (16 hex digits) of a stage's module and all modules of this package that it imports.

    Data files that bear a module's name (`report.html.j2` beside `report.py`) count with it, and so do files
    in CUDA C++ that lie beside it and are named in it. The files
    are read once a process: Snakemake asks for every job.

    Args:
        stage: a command (see `commands`), for instance `evaluate`, or a module of this package.
        criterion_file: the file of the criterion in use, which no stage imports by name.
    """
    content = hashlib.sha256()
    used = _closure(stage)
    if criterion_file is not None:
        used = used.union(*(_closure(name) for name in _imports(Path(criterion_file))))
    for name in sorted(used):
        content.update(_content(name))
    if criterion_file is not None:
        content.update(Path(criterion_file).read_bytes())
    return content.hexdigest()[:16]


@functools.cache
def _content(name: str) -> bytes:
    source = _module_file(name)
    beside = _names(source.parent)
    own = [one for one in beside if one.startswith(f"{source.stem}.")]
    kernels = [one for one in beside if one.endswith(".cu")]
    if kernels:
        text = source.read_bytes()
        own += [one for one in kernels if f'"{one}"'.encode() in text]
    return b"".join((source.parent / one).read_bytes() for one in sorted(own))


@functools.cache
def _names(folder: Path) -> list[str]:
    return os.listdir(folder)


@functools.cache
def _closure(stage: str) -> frozenset[str]:
    found: set[str] = set()
    waiting = [COMMANDS[stage].module if stage in COMMANDS else stage]
    while waiting:
        name = waiting.pop()
        if name in found or name in _NO_SCIENCE:
            continue
        found.add(name)
        waiting += _imports(_module_file(name))
    return frozenset(found)


# An import of this package as nearly all are written.
_PLAIN = re.compile(
    rb"^[ \t]*((?:from|import) sparsity_atlas\b[^\n(\\;#]*(?:\([\w\s,]*\))?)$", re.MULTILINE
)


@functools.cache
def _imports(path: Path) -> list[str]:
    """Modules of this package that a source file imports, anywhere in it."""
    names = []
    source = path.read_bytes()
    # Each start of Snakemake asks for all files, and to parse them would be a third of it: where the package
    # is named in plain imports and nowhere else, only these are parsed.
    plain = b"\n".join(_PLAIN.findall(source))
    if source.count(PACKAGE.name.encode()) == plain.count(PACKAGE.name.encode()):
        source = plain
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, name = module.partition(".")
            if package == PACKAGE.name and name and name not in names and _is_module(name):
                names.append(name)
    return names


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement, those inside others too. To visit every expression takes ten times as long."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, part, ())


@functools.cache
def _is_module(name: str) -> bool:
    return _module_file(name).exists()


@functools.cache
def _module_file(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
