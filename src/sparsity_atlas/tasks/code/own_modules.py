"""Somebody's own modules and files beside what is installed: where they lie."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2]
_INSTALLED = tuple(
    {
        Path(sysconfig.get_path(name)).resolve()
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    | {PACKAGE}
)


def local(path: Path) -> bool:
    """Whether a file is somebody's own: neither installed nor part of Python or of this package."""
    named = _named(os.environ.get("PYTHONPATH", ""))
    return not any(path.is_relative_to(folder) for folder in (*_INSTALLED, *named.installed))


def import_roots() -> list[Path]:
    """Where Python looks for local modules: the working directory, and PYTHONPATH but for packages there."""
    return [Path.cwd(), *_named(os.environ.get("PYTHONPATH", "")).own]


class _Named(NamedTuple):
    """Folders of PYTHONPATH: somebody's own, and those that packages were installed into."""

    own: tuple[Path, ...]
    installed: tuple[Path, ...]


@functools.cache
def _named(variable: str) -> _Named:
    """The folders that the variable names.

    `pip install --target` leaves records of what it installed, and whoever names its folder there would
    have all that a package imports followed, through the whole of PyTorch.
    """
    folders = [Path(one) for one in variable.split(os.pathsep) if one]
    installed = {one for one in folders if next(one.glob("*.dist-info"), None) is not None}
    return _Named(
        tuple(one for one in folders if one not in installed),
        tuple(one.resolve() for one in folders if one in installed),
    )


def module_files(bases: Iterable[Path], name: str) -> list[Path]:
    """Files of a dotted module and of the packages that it lies in, in every folder that has them."""
    parts = name.split(".")
    found = []
    for base in bases:
        for depth in range(1, len(parts) + 1):
            place = base.joinpath(*parts[:depth])
            candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
            found += [path for path in candidates if os.path.isfile(path)]
    return found


def files_below(folder: Path) -> list[Path]:
    """Files in a folder and below it, but for hidden ones and the results of a run."""
    return list(files_in(folder))


def files_in(folder: Path) -> Iterator[Path]:
    """The same, one by one."""
    for top, folders, names in os.walk(folder):
        if "run_config.yaml" in names:
            folders.clear()
            continue
        folders[:] = sorted(one for one in folders if not one.startswith((".", "__pycache__")))
        yield from (Path(top, name) for name in sorted(names) if not name.startswith("."))
