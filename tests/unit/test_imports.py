"""What each stage imports before it knows what it has to do: nothing that it may not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparsity_atlas.commands import COMMANDS

# Seconds each, on the machine of the tests; a stage that needs one imports it when it does.
HEAVY = {"torch", "transformers", "lm_eval", "datasets", "huggingface_hub", "snakemake", "triton"}
TABLES = {"pandas", "seaborn", "matplotlib", "scipy.stats"}
PROBE = "import sys, sparsity_atlas.{0}; print(*(name for name in {1!r} if name in sys.modules))"


def imported(module: str, among: set[str]) -> set[str]:
    code = PROBE.format(module, sorted(among))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "stage",
    ["run_config", "models", "capture", "metrics", "output_error", "search", "evaluate", "curve"],
)
def test_stages_that_run_or_read_a_model(stage: str) -> None:
    assert imported(COMMANDS[stage].module, HEAVY | TABLES) == set()


def test_tables_and_summaries() -> None:
    assert imported("tables.summarize", HEAVY | TABLES | {"zarr"}) == set()


def test_the_report_draws_but_runs_no_model() -> None:
    assert imported("report.report", HEAVY) == set()


def test_the_dag() -> None:
    """Every Snakemake process, also the two in each job of a cluster, pays for this."""
    assert imported("rules.asks", HEAVY | TABLES | {"numpy", "pyarrow", "scipy"}) == set()
