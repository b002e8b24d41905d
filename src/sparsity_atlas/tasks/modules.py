"""The modules that a task's own code imports: known by name, and kept apart from other tasks' modules.

Two tasks may each have a `common.py` that they put on `sys.path`, and a worker that stays in memory may load
a task again after its helper was edited: in one table of modules, the second would get the first one's.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from sparsity_atlas.tasks.code.own_modules import local


class OwnModules:
    """What is imported while `active`, found again whenever it is active again, and by nobody else.

    Args:
        files: Python files that are known before anything is imported.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._files = {path.resolve() for path in files}
        self._modules: dict[str, ModuleType] = {}
        self._path: list[str] | None = None

    def files(self) -> set[Path]:
        """The files that are known, and those of the modules that were imported so far."""
        found = (getattr(module, "__file__", None) for module in self._modules.values())
        return self._files | {Path(file).resolve() for file in found if file}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run code of the task; not to be entered twice at a time."""
        before = dict(sys.modules)
        path, writes = sys.path[:], sys.dont_write_bytecode
        # lm-eval names a module by the path of its file.
        hidden = {name: module for name, module in before.items() if name.startswith("/")}
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(self._modules)
        if self._path is not None:
            sys.path[:] = self._path
        # Compiled code is known by the second and the size of its source: not by a quick edit.
        sys.dont_write_bytecode = True
        importlib.invalidate_caches()
        try:
            yield
        finally:
            self._modules |= {
                name: module
                for name, module in sys.modules.items()
                if before.get(name) is not module and _is_local(module)
            }
            for name in self._modules:
                sys.modules.pop(name, None)
            sys.modules.update(hidden)
            sys.modules.update({name: before[name] for name in self._modules if name in before})
            self._path = sys.path[:]
            sys.path[:], sys.dont_write_bytecode = path, writes


def _is_local(module: object) -> bool:
    """Whether a module, or a package without a file of its own, is neither installed nor ours."""
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", ()))
    return bool(places) and all(local(Path(place).resolve()) for place in places)
