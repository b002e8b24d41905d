"""How fast things go on this machine: forward passes, imports, and what earlier runs recorded."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sparsity_atlas.activations.dimension import dimension
from sparsity_atlas.activations.metrics import layer_metrics
from sparsity_atlas.activations.point_dimension import fewest_points, point_dimensions
from sparsity_atlas.curves.critical import critical
from sparsity_atlas.curves.equal_sparsity import REPLICATES, equal_rows
from sparsity_atlas.curves.points import curve_points, estimate_all
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.session import Session
from sparsity_atlas.files.journal import Journal
from sparsity_atlas.lm import forest
from sparsity_atlas.lm.model import AtlasLM
from sparsity_atlas.lm.work import Work
from sparsity_atlas.plan.dry_run import Batch, TaskCost
from sparsity_atlas.statistics.auroc import resampled_aurocs
from sparsity_atlas.statistics.bootstrap import TaskSamples

# A timing need not be longer; a whole batch of a large model on a CPU takes minutes.
ENOUGH_SECONDS = 0.4
SMALLEST = (1, 32)  # rows, tokens
FEW_REPLICATES = 1000  # of the bootstrap, to time it
MOST_PANELS = 6  # of a figure that is drawn to time others; those of many models are about as dear
FEW_POINTS = 200  # of a layer, to time their local dimension
FEW_TOKENS, SMALL_SIDE = 128, 384  # of a tensor and its Gram matrix, to time their metrics


HEAVY_IMPORTS = (
    "sparsity_atlas.lm.model, sparsity_atlas.sites.find, sparsity_atlas.tasks.load, "
    "lm_eval.evaluator"
)
# Of one that finds its tensors captured; the first of a model, which loads it, has all of the above.
CAPTURE_IMPORTS = "sparsity_atlas.activations.capture, torch, zarr, transformers.models.auto"
LIGHT_IMPORTS = "sparsity_atlas.curves.curve, sparsity_atlas.tables.summarize"
DRAWING_IMPORTS = {"figures": "sparsity_atlas.figures.draw", "page": "sparsity_atlas.report.report"}
IMPORTS = {
    "heavy": HEAVY_IMPORTS,
    "capture": CAPTURE_IMPORTS,
    "light": LIGHT_IMPORTS,
} | DRAWING_IMPORTS


class TimedLM(AtlasLM):
    """Scores batches for their time only."""

    def time(self, batch: Batch) -> float:
        """Seconds of one pass over a batch; on a GPU of two, one begun before the other is read."""
        # Longer than any request of the task where several share a row; a model may have no such place.
        requests = [
            forest.Request(
                [*row[: self.max_length], 0], min(predicted, len(row), self.max_length), i
            )
            for i, (row, predicted) in enumerate(zip(batch.rows, batch.predicted, strict=True))
        ]
        (packed,) = forest.pack(requests, len(requests), share=False)
        count = 1 if self.device.type == "cpu" else 2
        began = time.perf_counter()
        for read in [self._score(packed) for _ in range(count)]:
            read()
        return (time.perf_counter() - began) / count


def cut(batch: Batch, rows: int, tokens: int) -> Batch:
    """The first rows and tokens of a batch."""
    kept = [row[:tokens] for row in batch.rows[:rows]]
    predicted = [
        max(1, min(count, len(row))) for row, count in zip(kept, batch.predicted, strict=False)
    ]
    return Batch(kept, predicted)


def piece(lm: TimedLM, batch: Batch) -> Batch:
    """As much of a batch as is needed to time it: all of it, if that does not take long.

    The shape matters: many short rows cost more a token than few long ones. On a GPU it is all of it: a pass
    over a few tokens takes as long as one over thousands, which it is launched for.
    """
    if lm.device.type != "cpu":
        return batch
    rows, tokens = SMALLEST
    while True:
        part = cut(batch, rows, tokens)
        whole = rows >= len(batch.rows) and tokens >= max(map(len, batch.rows))
        lm.time(part)  # the first pass over a new shape is slower
        if whole or lm.time(part) > ENOUGH_SECONDS / 3:
            return part
        if tokens < max(map(len, batch.rows)):
            tokens *= 2
        else:
            rows *= 2


def node_seconds(
    session: Session, nodes: list[Node | None], costs: dict[str, TaskCost]
) -> tuple[float, list[dict[str, float]]]:
    """Seconds of the forward passes of each task, for each node.

    Args:
        session: with a `TimedLM`, whose model has not been run yet.
        nodes: None is the dense baseline.
        costs: of each task.

    Returns:
        How much longer the first passes of a process take on a GPU (kernels, plans for each shape); on a CPU
        0, since what is compiled is kept for all. And the seconds.
    """
    lm = session.lm
    assert isinstance(lm, TimedLM)
    pieces: dict[str, Batch] = {}
    seconds: list[dict[str, float]] = []
    longer = 0.0
    with tempfile.TemporaryDirectory() as folder:
        # The dense model first, by which each shape has been seen before others are timed.
        for number, node in enumerate([None, *(node for node in nodes if node is not None)]):
            began = time.perf_counter()
            with session.attach(node) as counter:
                lm.start(Journal(Path(folder, str(number)), {}), counter, Work())
                if not number:
                    pieces = {name: piece(lm, cost.sample) for name, cost in costs.items()}
                for part in pieces.values():
                    lm.time(cut(part, *SMALLEST))
                    if not number and lm.device.type != "cpu":
                        lm.time(part)
                seen = time.perf_counter()
                times = {
                    name: _seconds(lm, pieces[name], cost, again=False)
                    for name, cost in costs.items()
                }
                if not number and lm.device.type != "cpu":
                    longer = max(2 * seen - began - time.perf_counter(), 0.0)
            seconds.append(times)
    dense, sparse = seconds[0], iter(seconds[1:])
    return longer, [dense if node is None else next(sparse) for node in nodes]


def _seconds(lm: TimedLM, part: Batch, cost: TaskCost, *, again: bool = True) -> float:
    """Seconds of a task's passes, from those of a part of its middle batch.

    Args:
        lm: that runs it.
        part: of the batch.
        cost: of the task.
        again: whether such passes may be its first, which take longer, so that they are timed twice.
    """
    if lm.device.type == "cpu":
        total = cost.positions / part.positions * lm.time(part)
    else:
        # A pass is launched, whatever it is over, and the rest goes by positions.
        small = cut(part, *SMALLEST)
        least, once = (min(lm.time(one) for _ in range(1 + again)) for one in (small, part))
        beyond = max(once - least, 0.0) / max(part.positions - small.positions, 1)
        total = cost.passes * least + cost.positions * beyond
    if cost.steps:
        # One token a row; a long context makes a step slower than this.
        total += cost.steps * lm.time(cut(cost.sample, len(cost.sample.rows), 1))
    return total


@contextlib.contextmanager
def importing(*, anything: bool) -> Iterator[dict[str, Future[float]]]:
    """Time imports beside whatever else is done, in processes of their own.

    One after the other took as long as all the rest of a plan; more than two at once keep each other waiting,
    longer than a run's jobs do.

    Args:
        anything: whether there is a job that would import.
    """
    with ThreadPoolExecutor(2 if len(os.sched_getaffinity(0)) > 5 else 1) as pool:
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


@functools.cache
def figure_seconds(*suffixes: str, panels: int) -> float:
    """Seconds that a figure of some panels takes: laid out, and saved in these formats.

    Args:
        suffixes: of the formats.
        panels: as many as models or sites are compared; more than `MOST_PANELS` are taken for so many.
    """
    from matplotlib.figure import Figure

    from sparsity_atlas.figures.style import arrange, save, styled

    took = 0.0
    with styled(), tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the first one finds fonts
            began = time.perf_counter()
            figure = Figure(figsize=(8, 5), layout="constrained")
            panels = min(panels, MOST_PANELS)
            columns = min(panels, MOST_PANELS // 2)
            for panel in figure.subplots(-(-panels // columns), columns, squeeze=False).flat:
                for line in range(4):
                    panel.plot(range(8), [line * place for place in range(8)], label=str(line))
                panel.legend()
            arrange(figure)
            for suffix in suffixes:
                save(figure, Path(folder, f"figure.{suffix}"))
            took = time.perf_counter() - began
    return took


def curve_seconds(replicates: int, documents: int, levels: int) -> float:
    """Seconds of one task's statistics in a curve, from a part of its replicates.

    Args:
        replicates: of the bootstrap.
        documents: of the task.
        levels: of the curve.
    """
    draw = np.random.default_rng(0)
    few = min(replicates, FEW_REPLICATES)
    shape = (levels, documents)
    samples = TaskSamples(
        task="timed",
        kind="accuracy",
        value=(draw.random(shape) < np.linspace(0.9, 0.4, levels)[:, None]).astype(float),
        weight=np.ones(documents),
        dense=np.ones(documents),
        zeros=np.cumsum(draw.integers(1, 100, shape), axis=0),
        entries=np.full(shape, 100 * (levels + 1)),
    )
    began = time.perf_counter()
    estimates = estimate_all([samples], few, 0)
    curve_points(estimates, [str(level) for level in range(levels)])
    critical(estimates)
    fitted = time.perf_counter()
    equal_rows(estimates)
    read = time.perf_counter()
    total = (fitted - began) * replicates + (read - fitted) * min(replicates, REPLICATES)
    # Of the task and of the average, which is of as many.
    return total / few / 2


@functools.cache
def metrics_seconds(tokens: int, width: int, *, ranked: bool = True) -> float:
    """Seconds of a layer's metrics, from a few of its tokens and a small Gram matrix.

    Args:
        tokens: that are captured.
        width: of the tensor.
        ranked: whether all its rows have an effective rank together; those of routed experts have not.
    """
    values = np.random.default_rng(0).standard_normal((FEW_TOKENS, width), dtype=np.float32)
    layer_metrics(values)  # the first one loads what the others find
    began = time.perf_counter()
    layer_metrics(values)
    total = (time.perf_counter() - began) * tokens / FEW_TOKENS
    if not ranked:
        return total
    small, other = sorted((tokens, width))
    side = min(small, SMALL_SIDE)
    square = np.random.default_rng(0).random((side, side))
    began = time.perf_counter()
    product = square.T @ square
    made = time.perf_counter()
    np.linalg.eigvalsh(product)
    solved = time.perf_counter()
    total += (made - began) * (small / side) ** 2 * other / side
    return total + (solved - made) * (small / side) ** 3


@functools.cache
def dimension_seconds(points: int, width: int) -> float:
    """Seconds of a layer's local dimension, from a few of its points: all pairs of them are looked at.

    Args:
        points: tokens among which it is estimated; 0: it is not.
        width: of the tensor.
    """
    if not points:
        return 0.0
    few = min(points, FEW_POINTS)
    values = np.random.default_rng(0).standard_normal((few, width))
    began = time.perf_counter()
    dimension(values)
    return (time.perf_counter() - began) * (points / few) ** 2


@functools.cache
def point_seconds(points: int, width: int, neighbours: int) -> float:
    """Seconds of the local dimension of each of some points, from a few of them.

    Args:
        points: all pairs of which are looked at.
        width: of the tensor.
        neighbours: of the estimate.
    """
    if points < fewest_points(neighbours):
        return 0.0
    few = min(points, max(FEW_POINTS, fewest_points(neighbours)))
    values = np.random.default_rng(0).standard_normal((few, width))
    began = time.perf_counter()
    point_dimensions(values, neighbours)
    return (time.perf_counter() - began) * (points / few) ** 2


@functools.cache
def area_seconds(samples: int, replicates: int) -> float:
    """Seconds of one area under a ROC curve with its bootstrap, from a part of its replicates."""
    few = min(replicates, FEW_REPLICATES)
    scores = np.random.default_rng(0).random((1, max(samples, 2)))
    began = time.perf_counter()
    resampled_aurocs(scores, scores[0] < 0.5, None, few, (0, "timed"))
    return (time.perf_counter() - began) * replicates / few


def recorded(benchmarks: Path) -> dict[str, float]:
    """Mean seconds of a rule's jobs in earlier runs, from Snakemake's extended benchmark records."""
    seconds = defaultdict(list)
    for path in benchmarks.rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "rule_name" in record:
                seconds[record["rule_name"]].append(record["s"])
    return {rule: sum(values) / len(values) for rule, values in seconds.items()}
