"""The one command: what it lists, runs and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsity_atlas.__main__ import main
from sparsity_atlas.commands import COMMANDS

pytestmark = pytest.mark.usefixtures("as_before")

ROOT = Path(__file__).parents[2]
# What takes longest to import; the list of commands needs none of it.
HEAVY = {"torch", "numpy", "pyarrow", "pydantic", "yaml", "sparsity_atlas.cli"}


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """Run the command in this process; the code that it ends with."""
    monkeypatch.setattr(sys, "argv", ["sparsity-atlas", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_help_lists_every_command_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert [line.split() for line in lines].count([*name.split(), *command.about.split()]) == 1
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its source: importing them all would take seconds."""
    path = ROOT.joinpath("src", "sparsity_atlas", *COMMANDS[name].module.split("."))
    assert "\ndef main(" in path.with_suffix(".py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["doctor", "zoo pairs"])
def test_a_command_runs_under_its_own_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *name.split(), "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: sparsity-atlas {name} ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["evalute"], "error: no command 'evalute'; did you mean evaluate?\n"),
        (["zoo", "trian"], "error: no command 'zoo'; did you mean zoo train?\n"),
        (["--results", "x"], "error: no command '--results'; sparsity-atlas --help lists them\n"),
    ],
)
def test_another_word_ends_in_one_line(
    words: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *words) == 2
    assert capsys.readouterr().err == line


def test_bad_input_of_a_tool_ends_in_one_line(tmp_path: Path) -> None:
    options = ["--model", "huge", "--corpus", "none.txt", "--valid", "none.txt", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "sparsity_atlas", "zoo", "train", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --model: found 'huge', expected one of small, medium")
    assert done.stderr.count("\n") == 1


def test_the_list_imports_nothing_that_it_does_not_need() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from sparsity_atlas.__main__ import main\n"
        "try: main()\n"
        f"finally: print(*({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")
