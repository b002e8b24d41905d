"""Target `plan`: what a configuration will cost, before anything runs.

Counts are exact where the configuration lists levels and the model and its tasks are here. Times come
from forward passes timed now, on this machine, and from the benchmarks of earlier runs. What stands in
the results is not charged. What cannot be known here is said, and is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.loading.devices import gpu_shares


def go_offline_if_unreachable(config: Config) -> None:
    """Use the cache alone if the Hub does not answer: each look-up would try for half a minute.

    To be called before anything imports huggingface_hub, which reads the setting once.
    """
    wanted = any(config.models[name].hub for name in grid.models(config)) or any(
        config.tasks[task].include is None
        for model in grid.models(config)
        for task in grid.model_tasks(config, model)
    )
    if not wanted or "HF_HUB_OFFLINE" in os.environ:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=3).close()
    except urllib.error.HTTPError:
        return  # an answer, if not a kind one
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def parallel_jobs(config: Config, cores: int) -> tuple[int, int]:
    """Jobs that run at once: of all one a core, and of those with a model as many as GPUs let.

    Returns:
        Both; the same number where no GPU is used.
    """
    import torch

    gpus = torch.cuda.device_count() * gpu_shares()
    return cores, min(cores, gpus) if gpus and config.device in ("auto", "cuda") else cores


def main() -> None:
    """Command line of the target."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas plan", description=__doc__)
    parser.add_argument(
        "--config", required=True, type=json.loads, help="JSON: the merged configuration"
    )
    parser.add_argument("--cores", default=1, type=int, help="jobs that run at once")
    parser.add_argument("--results", default=Path("results"), type=Path, help="folder of results")
    arguments = parser.parse_args()

    config = parse(arguments.config)
    go_offline_if_unreachable(config)
    from sparsity_atlas.plan.expected_seconds import save
    from sparsity_atlas.plan.forecast import forecast
    from sparsity_atlas.plan.text import text

    parallel = parallel_jobs(config, arguments.cores)
    found = forecast(config, arguments.results)
    save(arguments.results, config, found.jobs, found.seconds, found.starts)
    sys.stdout.write(text(config, found, parallel))
