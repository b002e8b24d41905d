"""The environments agree with the package."""

from __future__ import annotations

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
