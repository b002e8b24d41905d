"""profiles/kubernetes as far as it goes without a cluster: every option is known, every GPU job complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from checkout import ROOT, Checkout


@pytest.mark.study
def test_a_dry_run(tmp_path: Path) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["kubernetes"]
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", packages]
    subprocess.run([*install, "--no-deps", *extra, "reretry<0.12", "sysrsync", "toml"], check=True)
    subprocess.run([*install, "kubernetes<33"], check=True)
    checkout = Checkout.make(tmp_path / "atlas")
    volume = ("--default-storage-prefix", f"{tmp_path}/storage")
    local = ("--local-storage-prefix", f"{tmp_path}/local")
    planned = checkout.run(
        *("--dry-run", "--workflow-profile", "profiles/kubernetes", *volume, *local),
        PYTHONPATH=f"{checkout.path / 'src'}{os.pathsep}{packages}",
    )
    assert planned.returncode == 0, planned.stdout
    assert f"{tmp_path}/storage/results/index.html" in planned.stdout


def test_the_executor_refuses_a_gpu_without_a_manufacturer() -> None:
    profile = yaml.safe_load((ROOT / "profiles/kubernetes/profile.yaml").read_text())
    given = {tuple(line.split("=")[0].split(":")) for line in profile["set-resources"]}
    with_gpu = {rule for rule, name in given if name == "gpu"}
    assert with_gpu == {rule for rule, name in given if name == "gpu_manufacturer"}
    assert with_gpu == {
        *("capture", "dense", "evaluate", "search", "output_error", "calibrate", "sensitivity"),
        "answers",
    }


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "cluster-generic"])
def test_every_rule_that_may_use_a_gpu_has_one(name: str) -> None:
    rules = {
        rule
        for path in (ROOT / "workflow/rules").glob("*.smk")
        for rule, body in re.findall(
            r"^rule (\w+):\n((?:[ \n].*\n?)*)", path.read_text(), re.MULTILINE
        )
        if "gpu=ask.gpus" in body
    }
    profile = yaml.safe_load((ROOT / f"profiles/{name}/profile.yaml").read_text())
    assert {line.split(":")[0] for line in profile["set-resources"] if ":gpu=1" in line} == rules
