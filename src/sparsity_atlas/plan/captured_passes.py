"""Passes of a model, or of its FFNs, over the captured tokens that jobs take beside the tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity_atlas.calibrate.allocation_cost import allocation, tokens_run
from sparsity_atlas.config import grid
from sparsity_atlas.terms import plain, tensors_at

if TYPE_CHECKING:
    from sparsity_atlas.config.schema import Config
    from sparsity_atlas.plan.jobs import Job

# What writing the later half of the captured text takes, in passes over it: on a CPU, of 16 sequences of 256
# tokens, 8 at a time, 7.7, 6.7, 5.5, 4.4 for models of 0.2, 0.4, 1.6, 4.8 M parameters outside the embedding.
GENERATED = 6


def passes_of_a_level(config: Config, job: Job) -> float:
    """Passes through the FFNs that a level of `output_error` takes: its own, and those of its predictors.

    These read the masks three times, once for each rank compute the FFN anew, and fit in float64.
    """
    ranks = config.studies.predictors or ()
    return 1 + (4 + len(ranks) if ranks and site_of(job) in ("up", "gate", "intermediate") else 0)


def passes_of_reuse(config: Config, levels: float) -> float:
    """Passes of the model over the captured tokens that prompts' masks take, of all levels of a curve.

    Writing what follows the prompts is a pass for each token, of as many rows as a batch has.
    """
    each = 2 + 3 * levels
    return sum(
        each + (GENERATED if one == "generated" else 0) for one in config.studies.prompt_reuse or ()
    )


def passes_of_allocation(config: Config, job: Job, layers: int) -> float:
    """Passes of the model over the captured tokens that a calibration takes to spread levels over layers."""
    tensors = len(tensors_at(job.node[1])) if job.node is not None else 0
    calibration = grid.calibration_tokens(config)
    run = tokens_run(allocation_of(config, job), layers, tensors, calibration)
    return run / config.capture.tokens


def allocation_of(config: Config, job: Job) -> str:
    """How the level of such a job's criterion is spread over layers."""
    return allocation(grid.criterion_slice(config, criterion_of(job)))


def criterion_of(job: Job) -> str:
    """The criterion of a job that has one."""
    return job.node[0] if job.node is not None else ""


def site_of(job: Job) -> str:
    """The site of such a job, whatever it is confined to."""
    return plain(job.node[1]) if job.node is not None else ""
