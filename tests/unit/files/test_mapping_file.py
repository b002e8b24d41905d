"""Configurations that are wrong as files: one line that says where, before Snakemake reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkout import ROOT
from snakemake_logger_plugin_atlas import misread
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.mapping_file import check_file

WRONG = {
    "no UTF-8": (b"a: 1\n# f\xfcr\n", "line 2: byte 0xfc is no text in UTF-8; save it as UTF-8"),
    "UTF-16": ("run: []".encode("utf-16"), "line 1: byte 0xff is no text in UTF-8"),
    "NUL": (b"run: []\n\0", "no YAML: unacceptable character"),
    "not closed": (b"run: [{models: [a\n", "line 2, column 1: no YAML: did not find expected"),
    "a tab": (b"run:\n\t- a\n", "line 2, column 1: no YAML: found character that cannot start"),
    "empty": (b"", "a mapping is wanted, found nothing"),
    "a list": (b"- a\n", "a mapping is wanted, found a list"),
    "a word": (b"hello\n", "a mapping is wanted, found a single value"),
    "a list in JSON": (b"[1]", "a mapping is wanted, found a list"),
    "a key twice": (
        b"models:\n  a: {path: x}\n  b: {path: y}\n  a: {path: z}\n",
        "line 4: 'a' stands there",
    ),
    "at the top": (
        b"seed: 1\nrun: []\nseed: 2\n",
        "line 3: 'seed' stands there twice, first in line 1",
    ),
    "in a list": (b"run: [{models: [a], models: [b]}]\n", "line 1: 'models' stands there twice"),
    "in JSON": (b'{"a": {"b": 1,\n\t"b": 2}}', "'b' stands twice in one mapping"),
    "too deep": (b"a: " + b"[" * 100_000, "exceeded maximum nesting depth"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_wrong_ends_in_one_line(what: str, tmp_path: Path) -> None:
    content, said = WRONG[what]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(AtlasError) as caught:
        check_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert misread(["snakemake", f"--configfile={path}"]) == str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffa: 1\n".encode(),
        b'{"a": 1,\n\t"b": {"a": 2}}',
        # Merged keys give way, and nothing is merged twice.
        b"x-all: &all {a: 1}\nb: {<<: *all, a: 2}\nc: {<<: *all}\n",
        b"a: &a [1, *a]\n",
        b"__use_yte__: true\n?if True:\n  a: 1\n?if False:\n  a: 2\n",
        b"a: {b: 1}\nb: {b: 1}\n",
    ],
)
def test_a_file_that_is_well_written(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    check_file(path)


def test_those_of_the_project_are_well_written() -> None:
    files = [ROOT / "config.yaml", *(ROOT / "config").glob("*.yaml")]
    files += (ROOT / "workflow/config").glob("*.yaml")
    assert len(files) > 10
    for path in files:
        check_file(path)


@pytest.mark.parametrize(
    ("entry", "path"), [("Snakefile", "config.yaml"), ("workflow/Snakefile", "config/config.yaml")]
)
def test_the_workflow_s_own_configuration_is_looked_at(
    entry: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (entry, path):
        Path(name).parent.mkdir(exist_ok=True)
    Path(path).write_text("seed: 1\nseed: 2\n")
    assert misread(["snakemake"]) is None  # of another workflow
    Path(entry).touch()
    assert misread(["snakemake"]) == f"{path}: line 2: 'seed' stands there twice, first in line 1"
