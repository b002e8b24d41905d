"""Another workflow uses this one as a module, with a prefix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkout import Checkout

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
