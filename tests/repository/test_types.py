"""The package is what its annotations say; what is checked stands in `pyproject.toml`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    """Kept between runs: what libraries say of their types takes longest to read."""
    return request.config.cache.mkdir("mypy")


def _mypy(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_types_of_the_whole_package_hold(cache: Path) -> None:
    count = len(list((ROOT / "src").rglob("*.py")))
    done = _mypy(cache)
    assert done.stdout == f"Success: no issues found in {count} source files\n", done.stderr


def test_a_wrong_and_a_missing_type_are_found(cache: Path, tmp_path: Path) -> None:
    """Or the settings would be read by nobody."""
    page = tmp_path / "page.py"
    page.write_text("def double(x):\n    return 2 * x\n\n\nname: str = 1\n", encoding="utf-8")
    found = _mypy(cache, str(page)).stdout
    assert "[no-untyped-def]" in found
    assert "[assignment]" in found
