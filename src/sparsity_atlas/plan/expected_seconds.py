"""What a run's jobs are expected to take before any has ended: as `plan` said, else by their kind.

Light enough for Snakemake's own process: no model is loaded and no task.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import digest, read_manifest, write_manifest
from sparsity_atlas.plan.captured_passes import passes_of_a_level
from sparsity_atlas.plan.jobs import Job, jobs
from sparsity_atlas.plan.schedule import Key
from sparsity_atlas.terms import TENSORS, layers_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_atlas.config.model_entry import ModelEntry
    from sparsity_atlas.plan.jobs import Amount

FILE = "logs/plan.json"
# Seconds of a small model's jobs on two cores, without its evaluations: what they are worth beside each
# other is what counts, since the first jobs of a run say how fast it is.
SECONDS = {
    **{"run_config": 1.0, "model": 4.0, "capture": 4.0, "metrics": 1.0, "calibrate": 5.0},
    **{"dense": 5.0, "evaluate": 1.0, "search": 4.0, "output_error": 7.0, "sensitivity": 12.0},
    **{"answers": 5.0, "truthfulness": 3.0, "speed": 60.0},
    **{"curve": 1.2, "model_summary": 1.0, "tables": 2.0, "figures": 6.0, "page": 4.0},
}
EVALUATION = 2.5
# The default run's, with which these were measured.
TASKS, CURVES = 3, 15
# Of what a job takes, the share that is the same whatever it is asked; the rest goes by its passes over masks
# or its tensors. SmolLM2-135M's on an H200: output errors of one layer, of all, and with three predictors
# take 30, 36 to 45 and 80 s.
SAME = {"output_error": 0.9, "metrics": 0.5}


def key_of(job: Job) -> Key:
    """What a job is found by."""
    criterion, site = job.node or ("", job.site)
    return Key(job.rule, job.model, criterion, site, job.task)


def save(results: Path, config: Config, every: Sequence[Job], seconds: Sequence[Amount]) -> None:
    """Keep a forecast among the workflow's logs, for the run that follows it.

    Args:
        results: folder of the results.
        config: the forecast's.
        every: its jobs.
        seconds: of each.
    """
    path = results / FILE
    if not path.parent.is_dir():
        return  # asked for outside of a workflow, which leaves nothing behind
    known = [
        {**vars(key_of(job)), "seconds": amount.expected}
        for job, amount in zip(every, seconds, strict=True)
        if not job.done and amount.complete
    ]
    write_manifest(path, {"config": _digest(config), "jobs": known})


def expected(config: Config, results: Path) -> list[tuple[Key, float]]:
    """Seconds of each job that is still to be done.

    Args:
        config: of the run.
        results: its folder.

    Raises:
        AtlasError: a damaged manifest among the results.
    """
    planned = _planned(results / FILE, config)
    sizes = {name: _bytes(entry) for name, entry in config.models.items()}
    left = [job for job in jobs(config, results) if not job.done]
    # A request of a masked-diffusion model is as many rows as it has samples; short answers have fewer. With
    # eight samples the zoo's takes 4.6 times as long as its causal twin.
    rows = {
        name: 1.0 if entry.diffusion is None else (1 + entry.diffusion.samples) / 2
        for name, entry in config.models.items()
    }
    known = [size for size in sizes.values() if size]
    mean = sum(known) / len(known) if known else 1
    large = {name: (size or mean) / mean for name, size in sizes.items()}
    usual = [
        _usual_seconds(job, large.get(job.model, 1.0), rows.get(job.model, 1.0))
        * _asked(job, large.get(job.model, 1.0), config)
        for job in left
    ]
    # What was not planned is put on the scale of what was.
    both: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for job, seconds in zip(left, usual, strict=True):
        if (key := key_of(job)) in planned:
            for rule in (job.rule, ""):
                both[rule][0] += planned[key]
                both[rule][1] += seconds

    def on_scale(job: Job, seconds: float) -> float:
        found, own = both.get(job.rule) or both.get("") or (1.0, 1.0)
        return planned.get(key_of(job), seconds * found / own)

    return [(key_of(job), on_scale(job, own)) for job, own in zip(left, usual, strict=True)]


def _digest(config: Config) -> str:
    return digest(json.loads(config.model_dump_json()))


def _planned(path: Path, config: Config) -> dict[Key, float]:
    """The forecast that `plan` left, by job; nothing if it was of another configuration."""
    try:
        content = read_manifest(path) if path.is_file() else {}
    except AtlasError:
        return {}  # of an interrupted disk or another release: a run does not end for it
    if content.get("config") != _digest(config):
        return {}
    return {
        Key(*(one[name] for name in ("rule", "model", "criterion", "site", "task"))): one["seconds"]
        for one in content["jobs"]
    }


def _bytes(entry: ModelEntry) -> int:
    """Of a local model's weights; 0 where they are not known."""
    if entry.gguf is not None:
        file = Path(entry.path or "", entry.gguf)
        return file.stat().st_size if file.is_file() else 0
    if entry.path is None:
        return 0
    return sum(file.stat().st_size for file in Path(entry.path).glob("*.safetensors"))


def _asked(job: Job, large: float, config: Config) -> float:
    """How much longer a job takes than one of its rule in the default run, by what it is asked.

    Args:
        job: the job.
        large: bytes of its model over the mean of all models.
        config: of the run.
    """
    if job.rule in ("tables", "figures", "page"):
        return (1 + len(grid.curves(config)) / CURVES) / 2
    if job.rule == "metrics":
        much = float(len(TENSORS[job.site]))
    elif job.rule == "output_error" and job.node is not None:
        # Of how many layers a site is confined to some is not known here; they are few.
        confined = bool(layers_named(job.node[1]))
        much = 0.0 if confined else large * passes_of_a_level(config, job)
    else:
        return 1.0
    same = SAME[job.rule]
    return same + (1 - same) * much


def _usual_seconds(job: Job, large: float, rows: float) -> float:
    """By rule, evaluations (of so many rows a request), and the model's size beside the others'."""
    evaluations = max((amount.expected for amount in job.evaluations.values()), default=0.0)
    # One task alone takes half as long as the default run's three.
    evaluations *= (1 + len(job.evaluations)) / (1 + TASKS)
    # Half of an evaluation of a small model is the same for all of them.
    return SECONDS.get(job.rule, 1.0) + EVALUATION * rows * evaluations * (0.5 + 0.5 * large)
