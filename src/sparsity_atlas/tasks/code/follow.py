"""The local files that a task's Python code reaches, found by reading the code, without running it.

Followed are imports anywhere in a file, relative ones and those by a text (`importlib`) among them, and
every text that names a file: what is opened, what is put on `sys.path`. A name that is computed cannot be
followed; then the files beside the code count, and the code is named in `Reach.computed`. A file may also be
named by an environment variable.
"""

from __future__ import annotations

import ast
import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.tasks.code import surroundings
from sparsity_atlas.tasks.code.own_modules import files_in, local, module_files
from sparsity_atlas.tasks.code.upwards import rise

# Files, and folders, that the texts of one file of code may stand for.
MOST, MOST_FOLDERS = 10_000, 1_000
# Calls whose argument names what is read or imported.
_READERS = {
    *("open", "read_text", "read_bytes", "fdopen", "fromfile", "memmap", "loadtxt", "genfromtxt"),
    *("listdir", "scandir", "iterdir", "walk", "glob", "iglob", "rglob"),
    *("import_module", "__import__", "spec_from_file_location", "run_path", "exec_module"),
    *("load_dataset", "load_from_disk", "from_file", "from_json", "from_csv", "from_parquet"),
    *("from_text", "read_csv", "read_json", "read_parquet", "read_table", "read_excel"),
}
_LOADERS = {"np", "numpy", "torch", "joblib"}  # whose `load` takes a name


@dataclass(frozen=True)
class Reach:
    """What code reaches.

    Attributes:
        files: of the code itself, what it imports, and what it names.
        computed: code that reads or imports by a name that it computes.
        unsteady: code that asks for the time, the machine or chance.
        variables: environment variables that code asks for.
    """

    files: frozenset[Path]
    computed: frozenset[Path]
    unsteady: frozenset[Path]
    variables: frozenset[str]


def reach(starts: Iterable[Path], roots: Iterable[Path]) -> Reach:
    """Follow code.

    Args:
        starts: Python files.
        roots: folders that imports and file names are looked for in, beside the code's own.
    """
    roots = list(roots)
    files: set[Path] = set()
    computed: set[Path] = set()
    unsteady: set[Path] = set()
    variables: set[str] = set()
    waiting = [path.resolve() for path in starts]
    while waiting:
        path = waiting.pop()
        if path in files or not local(path):
            continue
        files.add(path)
        if path.suffix != ".py":
            continue
        code = _Code.read(path, roots)
        if code is None:
            continue
        waiting += code.found
        variables |= code.variables
        if code.unsteady:
            unsteady.add(path)
        if code.computed:
            computed.add(path)
            waiting += code.beside
    return Reach(frozenset(files), frozenset(computed), frozenset(unsteady), frozenset(variables))


@dataclass(frozen=True)
class _Code:
    """One Python file: what it names, whether it computes names, and what lies where it may look."""

    found: list[Path]
    computed: bool
    beside: list[Path]
    unsteady: bool
    variables: set[str]

    @classmethod
    def read(cls, path: Path, roots: list[Path]) -> _Code | None:
        """None if the file cannot be read as Python; whoever runs it will say why.

        Raises:
            AtlasError: its texts stand for more files or folders than can be looked through.
        """
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        above = path.parents[1 : 1 + rise(tree, len(path.parents) - 1)]
        bases = list(dict.fromkeys([path.parent, *above, *roots]))
        texts = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        texts = {text for text in texts if _may_be_a_name(text)}
        folders = _folders(bases, texts, path)
        variables = surroundings.variables(tree)
        values = {name: value for name in variables if (value := os.environ.get(name))}
        # Of a folder that a variable names only what the code names in it: it may be somebody's home.
        bases += [*folders, *(Path(one) for one in values.values() if os.path.isdir(one))]
        named = {text: _files(bases, text, path) for text in texts}
        for name, one in values.items():
            named[name] = named.get(name, []) + _files(bases, one, path)
        modules = [*_imports(tree), *(text for text in texts if _is_dotted(text))]
        found = [file for files in named.values() for file in files]
        found += [file for name in modules for file in module_files(bases, name)]
        found += _relative(tree, path)
        beside = [file for file in path.parent.iterdir() if _plain(file)]
        computes = any(_computes(call, tree, named) for call in _reads(tree))
        below = _below(folders, path) if computes else []
        unsteady = surroundings.is_unsteady(tree)
        return cls(found, computes, [*beside, *below], unsteady, variables)


def _plain(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _may_be_a_name(text: str) -> bool:
    return 0 < len(text) < 256 and "\n" not in text and "\0" not in text and bool(text.strip("./ "))


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _too_many(path: Path, what: str, most: int, where: Path) -> AtlasError:
    return AtlasError(
        f"tasks: {path}: its texts stand for more than {most:,} {what} ({where} among them), and all of "
        "them would count: name files, or a folder that holds fewer"
    )


def _below(folders: list[Path], path: Path) -> list[Path]:
    """What lies in folders that code names and below them.

    Raises:
        AtlasError: too much.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not any(one in folders for one in folder.parents):
            for file in files_in(folder):
                found[file] = None
                if len(found) > MOST:
                    raise _too_many(path, "files", MOST, folder)
    return list(found)


def _folders(bases: list[Path], texts: set[str], path: Path) -> list[Path]:
    """Folders that the texts name, alone or one inside the other.

    Raises:
        AtlasError: too many.
    """
    found: dict[Path, None] = {}
    waiting = list(bases)
    while waiting:
        base = waiting.pop()
        for text in texts:
            folder = base / (text if len(Path(text).parts) > 2 else text.lstrip("/"))
            # Not what encloses the code: `..` is seen by its own sign.
            if os.path.isdir(folder) and folder not in found and folder not in base.parents:
                found[folder] = None
                if len(found) > MOST_FOLDERS:
                    raise _too_many(path, "folders", MOST_FOLDERS, folder)
                if len(folder.parts) < len(base.parts) + 8:
                    waiting.append(folder)
    return list(found)


def _files(bases: list[Path], text: str, path: Path) -> list[Path]:
    """Files that a text names, seen from some folders; it may begin where an f-string's name ends.

    Raises:
        AtlasError: too many.
    """
    text = os.path.expanduser(os.path.expandvars(text))
    names = {text, text.lstrip("/")}
    found = [base / name for base in bases for name in names if os.path.isfile(base / name)]
    if glob.has_magic(text):
        for base in bases:
            pattern = os.path.join(glob.escape(str(base)), text.lstrip("/"))
            for seen, one in enumerate(glob.iglob(pattern, recursive=True)):
                if seen >= MOST:
                    raise _too_many(path, "files", MOST, base)
                if os.path.isfile(one):
                    found.append(Path(one))
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules that code imports, as seen from the folders that imports are looked for in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _of_import(node)


def _of_import(node: ast.ImportFrom) -> Iterator[str]:
    """The module that names are imported from, and each name, which may be a module."""
    if node.module:
        yield node.module
    prefix = f"{node.module}." if node.module else ""
    yield from (f"{prefix}{alias.name}" for alias in node.names if alias.name != "*")


def _relative(tree: ast.AST, path: Path) -> Iterator[Path]:
    """Files of relative imports, which are looked for from the folder that their dots lead to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(path.parents):
            passed = path.parents[: node.level]
            yield from (one / "__init__.py" for one in passed if (one / "__init__.py").is_file())
            for name in _of_import(node):
                yield from module_files([passed[-1]], name)


def _reads(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            owner = getattr(getattr(function, "value", None), "id", "")
            if name in _READERS or (name == "load" and owner in _LOADERS):
                yield node


def _computes(call: ast.Call, tree: ast.AST, named: dict[str, list[Path]]) -> bool:
    """Whether what a call reads follows from more than texts that name files."""
    texts, names = _parts(call)
    if isinstance(call.func, ast.Name):
        names.discard(call.func.id)
    elif (
        isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in _imported(tree)
    ):
        names.discard(call.func.value.id)  # a module's function
    seen: set[str] = set()
    while names - seen:
        name = (names - seen).pop()
        seen.add(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(
                getattr(target, "id", None) == name for target in node.targets
            ):
                more, others = _parts(node.value)
                texts |= more
                names |= others
    varies = bool(names) or any(isinstance(one, ast.JoinedStr) for one in ast.walk(call))
    return varies and not any(named.get(text) for text in texts)


def _imported(tree: ast.AST) -> set[str]:
    """Names that imports bind."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return {alias.asname or alias.name.partition(".")[0] for node in nodes for alias in node.names}


def _parts(node: ast.AST) -> tuple[set[str], set[str]]:
    """Texts and names inside an expression."""
    inside = list(ast.walk(node))
    texts = {
        one.value for one in inside if isinstance(one, ast.Constant) and isinstance(one.value, str)
    }
    return texts, {one.id for one in inside if isinstance(one, ast.Name)}
