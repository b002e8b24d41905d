"""Listed levels of one model with a shared worker and without: the time of Snakemake's run of the nodes.

    python benchmarks/listed.py

In copies of the checkout, so that nothing is reused; manifest and dense baseline are made first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "config.yaml", "workflow", "src", "profiles", "envs", "pyproject.toml")


def snakemake(folder: Path, targets: list[str], cores: int, worker: str) -> float:
    """Seconds of a run."""
    start = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "--cores", str(cores)),
            *(*targets, "--configfile", "listed.yaml"),
        ],
        cwd=folder,
        env={
            **os.environ,
            **{"SPARSITY_ATLAS_WORKER": worker, "PYTHONPATH": str(folder / "src")},
        },
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo-medium")
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--tasks", default="prose,pairs,cloze", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    levels = [round(1 - 0.9 * (i + 1) / arguments.levels, 4) for i in range(arguments.levels)]
    block = {"models": [arguments.model], "criteria": ["topp"], "sites": ["intermediate"]}
    block |= {"levels": levels, "tasks": arguments.tasks.split(",")}
    place = f"results/{arguments.model}"
    nodes = [f"{place}/topp/intermediate/{level:g}/eval.json" for level in levels]
    times: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(arguments.rounds):
        for worker, found in times.items():
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                for part in PARTS:
                    copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
                    copy(ROOT / part, folder / part)
                (folder / "listed.yaml").write_text(yaml.safe_dump({"run": [block]}))
                snakemake(folder, [f"{place}/dense/eval.json"], arguments.cores, worker)
                found.append(snakemake(folder, nodes, arguments.cores, worker))
    without, shared = (min(times[worker]) for worker in ("off", "on"))
    print(f"{arguments.model}, {len(levels)} levels of {arguments.tasks}, {arguments.cores} cores")
    print(f"each node a process of its own {without:6.1f} s, {without / len(levels):.2f} s a node")
    print(f"with a shared worker           {shared:6.1f} s, {shared / len(levels):.2f} s a node")
    print(f"saved: {1 - shared / without:.0%}")


if __name__ == "__main__":
    main()
