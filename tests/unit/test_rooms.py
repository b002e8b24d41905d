"""The rooms of the package: their order, their size and their names."""

from __future__ import annotations

import ast
import logging
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from longest import LONGEST

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "sparsity_atlas"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/**/__init__.py"))
# A folder of like files, found by name.
REGISTRY = PACKAGE / "criteria" / "built_in"
MOST_FILES = 15
MOST_LINES = 350
# What Numba compiles stays in one file, whose edits it would not notice in another.
LONG = {PACKAGE / "kernels" / "cpu_row.py"}


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """import-linter configures logging, which silences every logger that is there."""
    loggers = [one for one in logging.root.manager.loggerDict.values() if hasattr(one, "disabled")]
    before = [one.disabled for one in loggers]
    yield
    for one, disabled in zip(loggers, before, strict=True):
        one.disabled = disabled


def test_rooms_import_downwards_and_not_in_circles() -> None:
    """The order stands in `pyproject.toml`; `lint-imports` shows what breaks it."""
    kept = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert kept == EXIT_STATUS_SUCCESS


def test_an_import_upwards_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the contract would be kept by looking at nothing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract, _) = settings["tool"]["importlinter"]["contracts"]
    upside_down = ", ".join(f'"{layer}"' for layer in reversed(contract["layers"]))
    path = tmp_path / "pyproject.toml"
    path.write_text(
        '[tool.importlinter]\nroot_package = "sparsity_atlas"\n'
        '[[tool.importlinter.contracts]]\nname = "wrong"\ntype = "layers"\n'
        f'containers = ["sparsity_atlas"]\nlayers = [{upside_down}]\n',
        encoding="utf-8",
    )
    assert lint_imports(config_filename=str(path), no_cache=True) != EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_says_what_lives_there_and_is_not_crowded(room: Path) -> None:
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert said, "no docstring"
    assert len(said.split("\n\n")[0].splitlines()) <= 2
    named = {PACKAGE / room / f"{name}.py" for name in re.findall(r"`(\w+)`", said)}
    assert any(path.exists() for path in named), "no file to start reading at"
    if room != REGISTRY:
        assert len(list(room.glob("*.py"))) - 1 <= MOST_FILES


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    long = {path for path in PACKAGE.rglob("*.py") if len(path.open().readlines()) > MOST_LINES}
    assert long == LONG


def test_no_two_files_bear_the_same_name() -> None:
    names = Counter(path.stem for path in PACKAGE.rglob("*.py"))
    del names["__init__"]
    assert [name for name, count in names.items() if count > 1] == []


def test_the_tests_stand_in_the_same_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    folders = {path.name for path in (ROOT / "tests/unit").iterdir() if [*path.glob("test_*.py")]}
    # What `upkeep` does is seen on whole results only, in tests/faults.
    assert folders == rooms - {"upkeep"}


def test_the_files_that_begin_first_are_there() -> None:
    files = {"/".join(path.parts[-2:]) for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(LONGEST) <= files
    assert len(set(LONGEST)) == len(LONGEST)
