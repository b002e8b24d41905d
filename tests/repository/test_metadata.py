"""What hosts and catalogues read of the repository is valid, and agrees with the package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkout import ROOT


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def _project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


@pytest.mark.parametrize(
    ("schema", "name"),
    [("github-workflows", ".github/workflows/ci.yml"), ("citation-file-format", "CITATION.cff")],
)
def test_files_follow_their_schema(schema: str, name: str) -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    command = [program, "--builtin-schema", f"vendor.{schema}", ROOT / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _actionlint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("actionlint")
    return subprocess.run([program, path], cwd=ROOT, capture_output=True, text=True)


def test_actionlint_finds_nothing_in_ci() -> None:
    done = _actionlint(ROOT / ".github/workflows/ci.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_finds_what_a_schema_lets_pass(tmp_path: Path) -> None:
    ci = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    path = tmp_path / "ci.yml"
    path.write_text(ci.replace("matrix.python", "matrix.pyhton"), encoding="utf-8")
    assert 'property "pyhton" is not defined' in _actionlint(path).stdout


def _deptry(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deptry", "src", "--config", str(config), "--no-ansi"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_what_the_package_imports_is_declared() -> None:
    done = _deptry(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stderr


def test_an_import_that_others_happen_to_bring_is_found(tmp_path: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    path = tmp_path / "pyproject.toml"
    path.write_text(re.sub(r'\n *"psutil>=.*', "", project), encoding="utf-8")
    assert "'psutil' imported but it is a transitive dependency" in _deptry(path).stderr


def test_one_version_and_licence() -> None:
    project, citation = _project(), _yaml("CITATION.cff")
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?{re.escape(project['version'])}\b", changes, re.MULTILINE)
    (holder,) = re.findall(r"Copyright \(c\) \d+ (.+)", (ROOT / "LICENSE").read_text())
    assert [author["name"] for author in citation["authors"]] == [holder]


def test_commits_are_checked_by_the_tools_of_the_tests() -> None:
    allowed = _project()["optional-dependencies"]["test"]
    hooks = [hook for repo in _yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    asked = {one for hook in hooks for one in hook["additional_dependencies"]}
    assert asked <= set(allowed)


def test_ci_runs_every_python_from_the_oldest_allowed() -> None:
    versions = _yaml(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == _project()["requires-python"]


def test_the_catalogue_finds_what_it_looks_for() -> None:
    """What snakemake-workflow-catalog and snakedeploy ask of a standardised workflow."""
    usage = _yaml(".snakemake-workflow-catalog.yml")["usage"]
    assert {"mandatory-flags", "software-stack-deployment", "report"} == set(usage)
    for name in ("workflow/Snakefile", "config/README.md", "config/config.yaml"):
        assert (ROOT / name).is_file()
    readme = (ROOT / "README.md").read_text(encoding="utf-8").lower()
    assert "snakemake" in readme
    assert "workflow" in readme
