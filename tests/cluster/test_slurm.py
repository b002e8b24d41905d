"""profiles/slurm on a real Slurm of one machine, with and without accounting.

Slurm's clients and the executor wait for ever for a controller that is gone; everything here ends at a
hard limit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from checkout import ZOO, Checkout, fork_server
from loopback import call, loopback, need_root, resources, start_cluster, stop_cluster
from sparsity_atlas.config.schema import parse
from sparsity_atlas.rules.footprint import Needs

NODE = "zoo-small/topk/intermediate/0.9"


def test_the_smoke_configuration_without_accounting(smoke: Checkout, tmp_path: Path) -> None:
    checkout = Checkout.make(tmp_path / "atlas")
    with loopback(tmp_path) as slurm:
        # As many threads as there: sums differ in their last bits.
        slurm.run(checkout, "--set-threads", "metrics=1", FORK_SERVER=fork_server())
        jobs = slurm.jobs("tres-per-job", "MinMemory", "State")
    assert checkout.contents() == smoke.contents()
    assert {job["State"] for job in jobs} == {"COMPLETED"}
    # A search is one job a curve, a listed node one; tables, figures and report are one together.
    assert Counter(job["rule"] for job in jobs) == {
        **{"model": 1, "capture": 2, "metrics": 2, "dense": 1, "search": 2, "evaluate": 2},
        **{"output_error": 3, "curve": 3, "sensitivity": 1, "report_figures_page_tables": 1},
    }
    gpu = {job["rule"] for job in jobs if resources(job)["gpu"]}
    assert gpu == {"capture", "dense", "evaluate", "search", "output_error", "sensitivity"}
    # As the rules say it, once the dense baseline has run; that one and listed nodes, which are submitted
    # with it, did not know their tasks.
    content = yaml.safe_load((checkout.results / "run_config.yaml").read_text())
    early = tmp_path / "early"
    (early / "zoo-small").mkdir(parents=True)
    shutil.copy2(checkout.results / "zoo-small/model.json", early / "zoo-small")
    sites = (None, "input", "intermediate")
    for job in jobs:
        if job["rule"] in gpu:
            known = early if job["rule"] in ("dense", "evaluate") else checkout.results
            needs = Needs(parse(content), str(known))
            asked = {needs.memory(job["rule"], "zoo-small", site) for site in sites}
            assert resources(job)["mem"] in asked, job["rule"]


def with_mixture(path: Path) -> Checkout:
    """A working copy in which the smoke configuration's model is a mixture of experts."""
    checkout = Checkout.make(path)
    folder = checkout.path / ZOO / "small"
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    # One dense layer, and one with a shared expert beside routed ones.
    config = AutoConfig.for_model(
        "qwen2_moe",
        **{"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
        **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return checkout


def test_a_cancelled_node_with_accounting(tmp_path: Path) -> None:
    """The node is submitted again, with twice the memory, and repeats no more than one batch.

    It is one of a mixture of experts, with a table by expert.
    """
    here = with_mixture(tmp_path / "here")
    once = here.run_well(f"results/{NODE}/eval.json").count(f"evaluate {NODE}/eval.json")
    checkout = with_mixture(tmp_path / "atlas")
    with loopback(tmp_path, accounting=True) as slurm:
        slurm.run(checkout, "results/zoo-small/model.json", FORK_SERVER=fork_server())
        process = slurm.start(checkout, f"results/{NODE}/eval.json", SLOW="3")
        deadline = time.monotonic() + 300
        while f"evaluate {NODE}/eval.json" not in checkout.forwards():
            assert time.monotonic() < deadline, "no node ran in five minutes"
            time.sleep(0.2)
        (running,) = (job for job in slurm.jobs("JobID", "State") if job["rule"] == "evaluate")
        call("scancel", running["JobID"])
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
        jobs = [job for job in slurm.jobs("tres-per-job", "MinMemory", "State")]
        recorded = call("sacct", "--allocations", "--noheader", "--parsable2", "--format=State")
    tries = [job for job in jobs if job["rule"] == "evaluate"]
    assert [job["State"] for job in tries] == ["CANCELLED", "COMPLETED"]
    first, second = (resources(job)["mem"] for job in tries)
    assert second == 2 * first
    # The executor would take the second for a job that runs.
    assert recorded.splitlines() == ["COMPLETED", "CANCELLED by 0", "COMPLETED"]
    assert checkout.contents(NODE) == here.contents(NODE)
    assert f"{NODE}/experts.parquet" in here.contents(NODE)
    assert once <= checkout.forwards().count(f"evaluate {NODE}/eval.json") <= once + 1


def test_a_cluster_is_taken_over_from_nobody_but_the_dead(tmp_path: Path) -> None:
    need_root()
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, used, refused = (tmp_path / name for name in ("left", "used", "refused"))
    try:
        assert start_cluster(left, owner=gone.pid).returncode == 0
        daemon = int((left / "slurmctld.pid").read_text())
        taken = start_cluster(used, owner=os.getpid())
        assert taken.returncode == 0, taken.stdout
        with pytest.raises(ProcessLookupError):
            os.kill(daemon, 0)
        done = start_cluster(refused, owner=os.getpid())
        assert done.returncode == 1
        assert f"in use by process {os.getpid()}" in done.stdout
        assert call("scontrol", "ping").strip().endswith("UP")
    finally:
        stop_cluster(used)
        stop_cluster(left)
