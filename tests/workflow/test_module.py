"""Another workflow uses this one as a module, with a prefix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from checkout import ROOT, Checkout

OTHER = """
configfile: "config.yaml"

module atlas:
    snakefile: "Snakefile"
    config: config
    prefix: "sparsity"

use rule * from atlas as atlas_*

use rule evaluate from atlas as atlas_evaluate with:
    threads: 2

rule plot:
    default_target: True
    input:
        table="sparsity/results/curves.csv",
        report="sparsity/results/index.html",
    output:
        "plot.txt",
    shell:
        "wc -l {input.table} > {output}"
"""


@pytest.fixture
def other(empty: Checkout, tmp_path: Path) -> Checkout:
    """A working copy with such a workflow beside it."""
    checkout = empty.copy(tmp_path / "atlas", state=False)
    (checkout.path / "other.smk").write_text(OTHER)
    return checkout


def test_every_file_has_the_prefix(other: Checkout) -> None:
    planned = other.plan("--snakefile", "other.smk", "--printshellcmds")
    assert planned.returncode == 0, planned.text
    assert planned.counts == {
        **{f"atlas_{rule}": 1 for rule in ("run_config", "model", "dense", "tables", "figures")},
        **{"atlas_page": 1, "atlas_capture": 2, "atlas_metrics": 2, "atlas_output_error": 3},
        **{"atlas_curve": 3, "atlas_search": 2, "atlas_evaluate": 2, "plot": 1},
        "atlas_sensitivity": 1,
    }
    assert not re.search(r"(?<!sparsity/)\bresults/", planned.text)


def test_stages_find_each_others_files(other: Checkout) -> None:
    target = "sparsity/results/zoo-small/metrics/input.parquet"
    other.run_well("--snakefile", "other.smk", target)
    model = other.path / "sparsity/results/zoo-small"
    assert (model / "activations.zarr/input").is_dir()
    assert (model / "metrics/input.parquet").is_file()
    assert not other.results.exists()
    # Whether a search has finished, and so which nodes it left, is looked for there, too.
    assert other.plan("--snakefile", "other.smk", target).jobs == set()


# As `snakedeploy deploy-workflow` writes it.
DEPLOYED = """
configfile: "config/config.yaml"

module sparsity_atlas:
    snakefile:
        {snakefile}
    config:
        config

use rule * from sparsity_atlas
"""
HOSTED = 'github("owner/atlas", path="workflow/Snakefile", tag="v1")'


@pytest.fixture
def user(tmp_path: Path) -> Checkout:
    """A folder of a user's own, with the template of a configuration and the profiles."""
    for name in ("config", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / "user" / name)
    (tmp_path / "user/workflow").mkdir()
    return Checkout(tmp_path / "user")


def deploy(user: Checkout, snakefile: str) -> None:
    (user.path / "workflow/Snakefile").write_text(DEPLOYED.format(snakefile=snakefile))


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[None]:
    """A clone of such a repository where Snakemake keeps those of GitHub, so that it fetches nothing."""
    made = tmp_path / "repository"
    for name in ("workflow/rules", "workflow/report", "envs"):
        shutil.copytree(ROOT / name, made / name)
    for name in ("Snakefile", "workflow/Snakefile"):
        shutil.copy2(ROOT / name, made / name)
    identity = ["-c", "user.name=name", "-c", "user.email=name@example.org"]
    clone = Path(os.environ["XDG_CACHE_HOME"], "snakemake/snakemake/source-cache")
    clone = clone / "snakemake-git-cache/github.com/owner/atlas"
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        [*identity, "commit", "--quiet", "--message", "all"],
        ["tag", "v1"],
        ["clone", "--quiet", "--bare", ".", str(clone)],
    ):
        subprocess.run(["git", *command], cwd=made, check=True)
    yield
    shutil.rmtree(clone)


def test_template_of_a_deployment_plans_all(user: Checkout, hosted: None) -> None:
    deploy(user, HOSTED)
    planned = user.dry_run()
    assert planned.returncode == 0, planned.text
    assert planned.counts == {
        **{rule: 1 for rule in ("run_config", "model", "dense", "tables", "figures", "page")},
        **{rule: 2 for rule in ("capture", "metrics", "search", "curve", "output_error")},
        **{"model_summary": 1, "default": 1},
    }


def test_checkout_as_a_module_finds_what_comes_with_it(user: Checkout) -> None:
    deploy(user, f'"{ROOT}/workflow/Snakefile"')
    shutil.copy2(ROOT / "config.yaml", user.path / "config/config.yaml")
    chosen = yaml.safe_load((ROOT / "workflow/config/smoke.yaml").read_text(encoding="utf-8"))
    planned = user.plan(config=chosen)
    assert planned.returncode == 0, planned.text
    assert planned.counts["model"] == 1


def test_entry_of_the_catalogue_is_the_whole_workflow(empty: Checkout) -> None:
    there = empty.plan("--snakefile", "workflow/Snakefile").counts
    assert there.pop("default") == empty.plan().counts["all"]
