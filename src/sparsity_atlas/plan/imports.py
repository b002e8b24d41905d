"""How long jobs take to import what they need, before they do anything else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

HEAVY_IMPORTS = (
    "sparsity_atlas.lm.model, sparsity_atlas.sites.find, sparsity_atlas.tasks.load, "
    "lm_eval.evaluator"
)
# Also of one that finds its tensors captured.
CAPTURE_IMPORTS = "sparsity_atlas.activations.capture, torch, zarr, transformers.models.auto"
LIGHT_IMPORTS = "sparsity_atlas.curves.curve, sparsity_atlas.tables.summarize"
DRAWING_IMPORTS = {"figures": "sparsity_atlas.figures.draw", "page": "sparsity_atlas.report.report"}
IMPORTS = {
    "light": LIGHT_IMPORTS,
    "capture": CAPTURE_IMPORTS,
    "heavy": HEAVY_IMPORTS,
} | DRAWING_IMPORTS


@contextlib.contextmanager
def importing(*, anything: bool) -> Iterator[dict[str, Future[float]]]:
    """Time imports beside whatever else is done, in processes of their own.

    One after the other took as long as all the rest of a plan. A run's jobs have others beside them, too.

    Args:
        anything: whether there is a job that would import.
    """
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 3)) as pool:
        try:
            wanted = IMPORTS if anything else {}
            yield {name: pool.submit(import_seconds, modules) for name, modules in wanted.items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def import_seconds(modules: str) -> float:
    """Seconds that a new Python process takes to import some modules, as a stage does."""
    began = time.perf_counter()
    code = f"from sparsity_atlas.garbage import look_hardly\nlook_hardly()\nimport {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - began
