"""How a stage ends: in one line where somebody can mend it, with a traceback where we must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError

RULE = """
import sys

class Mute(Exception):
    def __str__(self):
        raise ValueError

class Odd(BaseException):
    pass

def call(error):
    raise error

def leave():
    sys.exit(0)

def mute():
    raise Mute

def odd():
    raise Odd("x")
"""


pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture
def theirs(tmp_path: Path) -> dict[str, Any]:
    """What a user's own file defines."""
    path = tmp_path / "mine.py"
    path.write_text(RULE)
    scope: dict[str, Any] = {}
    exec(compile(RULE, str(path), "exec"), scope)
    return scope


def ended(stage: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    """What a stage said in its only line."""
    with pytest.raises(SystemExit) as caught:
        cli.run(stage)
    assert caught.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("wrong\nand more"), "ValueError: wrong"),
        (OSError("no number"), "OSError: no number"),
        (KeyboardInterrupt(), "KeyboardInterrupt: no message"),
        (RecursionError("deep"), "RecursionError: deep"),
    ],
)
def test_what_code_of_the_users_raises(
    theirs: dict[str, Any], error: BaseException, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ended(lambda: theirs["call"](error), capsys)
    assert line.endswith(f"mine.py, line 12: {says}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("leave", "line 15: SystemExit: 0"),
        ("mute", "line 18: Mute: <exception str() failed>"),
        ("odd", "line 21: Odd: x"),
    ],
)
def test_so_it_is_with_what_is_no_common_error(
    theirs: dict[str, Any], name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """sys.exit() among them, which would pass for success."""
    assert ended(theirs[name], capsys).endswith(f"mine.py, {says}")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "not enough memory (no message); a smaller batch_size needs less"),
        (
            torch.OutOfMemoryError("CUDA"),
            "not enough memory (CUDA); a smaller batch_size needs less",
        ),
        (IsADirectoryError(21, "x", "a/b"), "a/b: it is a folder, where a file was expected"),
        (AtlasError("config: mend it"), "config: mend it"),
    ],
)
def test_what_can_be_mended(
    error: Exception, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage() -> None:
        raise error

    assert ended(stage, capsys) == says


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def stage() -> None:
        cli.optional_path(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError):
        cli.run(stage)
