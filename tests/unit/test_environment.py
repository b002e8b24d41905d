"""The environments agree with the package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_conda_environment_has_the_requirements_of_the_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        required = tomllib.load(file)["project"]["dependencies"]
    environment = yaml.safe_load((ROOT / "envs/atlas.yaml").read_text(encoding="utf-8"))
    (listed,) = [one["pip"] for one in environment["dependencies"] if isinstance(one, dict)]
    assert listed == required


def test_every_rule_with_an_environment_names_one_that_is_there() -> None:
    for rules in sorted((ROOT / "workflow/rules").glob("*.smk")):
        for name in re.findall(r'conda:\n\s+"([^"]+)"', rules.read_text(encoding="utf-8")):
            assert (rules.parent / name).resolve() == ROOT / "envs/atlas.yaml"


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_copies_what_the_workflow_is_made_of() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert copied >= {"Snakefile", "config.yaml", "workflow", "profiles", "src", "envs"}
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} <= set(kept)
