"""What code reaches above its own folder: all that it may read there, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.tasks.code import follow
from sparsity_atlas.tasks.code.follow import reach

COMPUTES = "def f(d):\n    return open(ROOT / 'texts' / d['name']).read()\n"
PATHS = "import tempfile\nfrom pathlib import Path\n"


def reached(folder: Path, code: str, files: dict[str, str]) -> set[str]:
    """Names of the files in a folder that code in its `a/b/u.py` reaches."""
    for name, text in {"a/b/u.py": code, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    found = reach([folder / "a" / "b" / "u.py"], []).files
    return {path.relative_to(folder.resolve()).as_posix() for path in found} - {"a/b/u.py"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..common import f\n", {"a/common.py", "a/__init__.py"}),
        ("from .. import common\n", {"a/common.py", "a/__init__.py"}),
        ("from ...common import f\n", {"common.py", "a/__init__.py"}),
        ("from .common import f\n", set()),
        (PATHS + "A = open(Path(__file__).parents[2] / 'p.txt')\n", {"p.txt"}),
        (PATHS + "A = open(Path(tempfile.mkdtemp()).parents[0] / 'p.txt')\n", set()),
        ('"""As Path(__file__).parents[2] / p.txt."""\nA = open("p.txt")\n', set()),
        ("def f(root):\n    return open(root.parent.parent / 'p.txt')\n", {"p.txt"}),
    ],
)
def test_above(tmp_path: Path, code: str, expected: set[str]) -> None:
    files = dict.fromkeys(("common.py", "a/common.py", "a/__init__.py", "p.txt"), "")
    assert reached(tmp_path, code, files) == expected


@pytest.mark.parametrize(("root", "counts"), [("__file__", True), ("tempfile.mkdtemp()", False)])
def test_folders_above_that_a_computed_name_may_mean(
    tmp_path: Path, root: str, counts: bool
) -> None:
    code = f"{PATHS}ROOT = Path({root}).resolve().parents[2]\n{COMPUTES}"
    assert reached(tmp_path, code, {"texts/x.txt": ""}) == ({"texts/x.txt"} if counts else set())


@pytest.mark.parametrize(("most", "what"), [("MOST", "files"), ("MOST_FOLDERS", "folders")])
def test_more_than_can_be_looked_through_ends_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, what: str
) -> None:
    monkeypatch.setattr(follow, most, 2)
    code = f"{PATHS}ROOT = Path(__file__).parents[2]\nA = ['x', 'y', 'z']\n{COMPUTES}"
    files = {f"texts/{one}/p.txt": "" for one in "xyz"}
    with pytest.raises(
        AtlasError, match=rf"u.py: its texts stand for more than 2 {what} \(.*texts"
    ):
        reached(tmp_path, code, files)


def test_a_pattern_that_means_too_much_ends_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "MOST", 2)
    files = dict.fromkeys(("a/b/1.txt", "a/b/2.txt", "a/b/3.txt"), "")
    with pytest.raises(AtlasError, match="more than 2 files"):
        reached(tmp_path, "import glob\nA = glob.glob('*.txt')\n", files)


def test_folders_are_walked_only_where_a_name_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "MOST", 2)
    code = f"{PATHS}A = open(Path(__file__).parents[2] / 'texts' / '1.txt')\n"
    files = {f"texts/{one}.txt": "" for one in range(4)}
    assert reached(tmp_path, code, files) == {"texts/1.txt"}
