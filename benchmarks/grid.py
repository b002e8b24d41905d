"""The cost of one critical sparsity: our search against the paper's grid of 26 levels.

    python benchmarks/grid.py
    python benchmarks/grid.py --levels 4        # of the grid; the rest is taken to cost the same

Same model, tasks, site and criterion. The grid has the structure of the paper's code: a process for each
level and task, which loads the model, builds and tokenises the task and runs lm-eval's own class with a
hook that sorts, sums in float64 and copies counts to the host. Ours is one process with one model load.
Both have one thread. Processors' seconds are compared: on a machine with other work the clock says little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import parse

ROOT = Path(__file__).parents[1]
SITE = "intermediate"
LEVELS = (
    *(
        "1",
        "0.995",
        "0.99",
        "0.985",
        "0.98",
        "0.975",
        "0.97",
        "0.96",
        "0.95",
        "0.94",
        "0.93",
        "0.92",
    ),
    *(
        "0.91",
        "0.9",
        "0.85",
        "0.8",
        "0.75",
        "0.7",
        "0.65",
        "0.6",
        "0.5",
        "0.4",
        "0.3",
        "0.2",
        "0.1",
        "0",
    ),
)


def official_job(model: Path, level: float, settings: dict[str, Any]) -> None:
    """One job of the grid: a level and a task, from nothing."""
    import torch
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from measure import official
    from sparsity_atlas.models.manifest import from_manifest, load, load_tokenizer
    from sparsity_atlas.sites.find import Vectors, bind_parts, intercept
    from sparsity_atlas.tasks.load import load_tasks

    manifest, checkpoint = from_manifest(model)
    loaded = load(checkpoint, dtype=settings["dtype"], device="cpu")
    lm = HFLM(pretrained=loaded, tokenizer=load_tokenizer(checkpoint), batch_size=16)
    (task,) = load_tasks(settings["tasks"], settings["seed"]).values()
    counts: list[list[int]] = []

    def rewrite(vectors: Vectors, onto: torch.Tensor) -> torch.Tensor:
        masked, zeros = official(vectors.values, level)
        counts.append(zeros)
        return masked

    with torch.no_grad(), intercept(bind_parts(loaded, manifest["ffn"]), SITE, rewrite):
        evaluator.evaluate(lm, task.contents, limit=task.limit, bootstrap_iters=0)


def spent(command: list[str]) -> tuple[float, float]:
    """Seconds of a process: by the clock, and of the processors."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo-medium", help="of config.yaml")
    parser.add_argument("--levels", type=int, default=len(LEVELS), help="of the grid, spread out")
    parser.add_argument("--job", nargs=3, metavar=("MODEL", "LEVEL", "SETTINGS"), help="internal")
    arguments = parser.parse_args()
    if arguments.job:
        model, level, settings = arguments.job
        official_job(Path(model), float(level), json.loads(settings))
        return

    import yaml

    config = parse(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    tasks = tuple(config.tasks)
    settings = grid.evaluation_slice(config, arguments.model, tasks)
    step = -(-len(LEVELS) // arguments.levels)
    chosen = LEVELS[::step]
    with tempfile.TemporaryDirectory() as folder:
        model, dense = f"{folder}/model.json", f"{folder}/dense/eval.json"
        about = ["--model", model, "--settings", settings]
        source = grid.fetch_slice(config, arguments.model)
        described = ["--name", arguments.model, "--source", source, "--output", model]
        spent(["-m", "sparsity_atlas", "models", *described])
        baseline = spent(["-m", "sparsity_atlas", "evaluate", *about, "--output", dense])
        rule = ["--criterion", grid.criterion_slice(config, "topp"), "--site", SITE]
        output = f"{folder}/topp/{SITE}/search.json"
        search = ["--dense", dense, "--search", grid.search_slice(config, tasks)]
        ours = spent(["-m", "sparsity_atlas", "search", *about, *search, *rule, "--output", output])
        levels = len(json.loads(Path(output).read_text(encoding="utf-8"))["levels"])
        theirs = [0.0, 0.0]
        for level in chosen:
            for task in tasks:
                job = grid.evaluation_slice(config, arguments.model, (task,))
                once = spent([__file__, "--job", model, level, job])
                theirs = [
                    a + b * len(LEVELS) / len(chosen) for a, b in zip(theirs, once, strict=True)
                ]
    print(f"{arguments.model}, topp at {SITE}, tasks {', '.join(tasks)}; one thread")
    print(f"grid:  {len(LEVELS)} levels x {len(tasks)} tasks, {len(chosen)} of the levels run")
    print(f"ours:  the dense baseline and a search of {levels} levels")
    for name, index in (("wall", 0), ("CPU", 1)):
        mine = baseline[index] + ours[index]
        print(
            f"{name}: grid {theirs[index]:.0f} s, ours {mine:.0f} s, ratio {theirs[index] / mine:.1f}"
        )


if __name__ == "__main__":
    main()
