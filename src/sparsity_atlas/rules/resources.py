"""What the rules ask of a job's resources: memory, minutes, GPUs and threads.

Snakemake passes how often a job has been tried, from 1.
"""

from __future__ import annotations

import functools
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from sparsity_atlas.calibrate.allocation_cost import allocation
from sparsity_atlas.config import grid
from sparsity_atlas.config.grid import Curve
from sparsity_atlas.config.schema import Config
from sparsity_atlas.evaluation.ahead import MOST
from sparsity_atlas.loading.devices import gpu_shares, inside_allocation, visible_gpus
from sparsity_atlas.rules.footprint import Needs, levels_of
from sparsity_atlas.rules.question import question
from sparsity_atlas.terms import tensors_at


class Wildcards(Protocol):
    """The parts of a path; a rule without a criterion in its path has no `criterion`."""

    model: str
    criterion: str
    site: str
    level: str


class Resources(ABC):
    """The part of `Asks` that answers for resources."""

    def __init__(self, config: Config, results: str) -> None:
        """Look at the configuration; see `Asks`."""
        self._config = config
        self._needs = Needs(config, results)
        self._gpus = int(config.device in ("auto", "cuda") and visible_gpus() > 0)

    @abstractmethod
    def curve_of(self, wildcards: Wildcards) -> Curve:
        """The curve of a path."""

    def memory(self, stage: str) -> Callable[..., int]:
        """MiB of host memory of a stage that loads a model."""
        return _scaled(functools.partial(self._asked, self._needs.memory, stage))

    @question
    def dense_memory(self, wildcards: Wildcards, attempt: int, threads: int) -> int:
        """That of a dense baseline, with a process for each further thread; see `dense_threads`."""
        return attempt * self._needs.memory("dense", wildcards.model, threads=threads)

    def gpu_memory(self, stage: str) -> Callable[..., int]:
        """MiB of GPU memory of such a stage, to be known where GPUs are chosen by it."""
        return _scaled(functools.partial(self._asked, self._needs.gpu_memory, stage))

    def _asked(self, need: Callable[..., int], stage: str, wildcards: Wildcards) -> int:
        # A path has a criterion where its site is one whose tensors are counted.
        site = wildcards.site if hasattr(wildcards, "criterion") else None
        return need(stage, wildcards.model, site)

    @question
    def capture_minutes(self, wildcards: Wildcards, attempt: int) -> int:
        """Minutes of a capture."""
        return attempt * self._needs.capture_minutes(wildcards.model)

    @question
    def error_minutes(self, wildcards: Wildcards, attempt: int) -> int:
        """Minutes of the output error of a curve's levels."""
        levels = levels_of(self._config, self.curve_of(wildcards))
        passes = levels + len(self._config.studies.prompt_reuse or ()) * (2 + 3 * levels)
        return attempt * self._needs.capture_minutes(wildcards.model, passes)

    @question
    def calibration_minutes(self, wildcards: Wildcards, attempt: int) -> int:
        """Minutes of a calibration, with what its allocation runs through the model."""
        kind = allocation(grid.criterion_slice(self._config, wildcards.criterion))
        return attempt * self._needs.calibration_minutes(
            wildcards.model, kind, len(tensors_at(wildcards.site))
        )

    @question
    def sensitivity_minutes(self, wildcards: Wildcards, attempt: int) -> int:
        """Minutes of passes with one layer sparsified."""
        curve = self.curve_of(wildcards)
        passes = len(curve.sensitivity) * len(tensors_at(curve.site))
        return attempt * self._needs.layer_by_layer_minutes(wildcards.model, passes)

    @question
    def node_minutes(self, wildcards: Wildcards, attempt: int) -> int:
        """Minutes of a node, or of a dense baseline."""
        return attempt * self._needs.evaluation_minutes(wildcards.model)

    @question
    def search_minutes(self, wildcards: Wildcards, attempt: int) -> int:
        """Minutes of a search."""
        levels = self._config.search.most_levels
        return attempt * self._needs.evaluation_minutes(wildcards.model, levels)

    @question
    def gpus(self, wildcards: Wildcards) -> int:
        """1 for a job that will use a GPU of this machine; a cluster's profile says so itself."""
        return self._gpus

    @question
    def capture_threads(self, wildcards: Wildcards) -> int:
        """Threads that write: where a GPU computes, one is slower than the disk.

        On a cluster its profile says so: a job asks again here, on a machine that may have GPUs where
        the one that submitted it had none, and must not take more cores than it was given.
        """
        return 4 if self._gpus and not inside_allocation() else 1

    @question
    def dense_threads(self, wildcards: Wildcards) -> int:
        """Threads of a dense baseline, the first to need its tasks' requests: all but one build them.

        As `capture_threads`; fewer where several jobs share a GPU, since these share the cores, too.
        """
        if not self._gpus or inside_allocation():
            return 1
        cores = len(os.sched_getaffinity(0)) // (visible_gpus() * gpu_shares())
        return max(1, min(1 + MOST, cores))


def _scaled(answer: Callable[[Any], int]) -> Callable[..., int]:
    """An answer for each attempt, which Snakemake may ask for as for a method."""

    def of_attempt(wildcards: Wildcards, attempt: int) -> int:
        return attempt * answer(wildcards)

    vars(of_attempt)["__signature__"] = inspect.signature(of_attempt)
    return of_attempt
