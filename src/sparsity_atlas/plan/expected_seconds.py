"""What a run's jobs are expected to take before any has ended: as `plan` said, else by their kind.

Light enough for Snakemake's own process: no model is loaded and no task.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import digest, read_manifest, write_manifest
from sparsity_atlas.loading.devices import gpu_shares, visible_gpus
from sparsity_atlas.plan.captured_passes import passes_of_a_level
from sparsity_atlas.plan.corrections import Seconds
from sparsity_atlas.plan.jobs import Job, jobs
from sparsity_atlas.plan.schedule import LAST, LIGHT, Key
from sparsity_atlas.tasks.local_files import find
from sparsity_atlas.terms import TENSORS, layers_named, tensors_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparsity_atlas.config.model_entry import ModelEntry
    from sparsity_atlas.config.schema import TaskEntry
    from sparsity_atlas.plan.jobs import Amount

FILE = "logs/plan.json"
# Seconds of jobs of models of the zoo on two cores, until they begin what they are for, and of that, without
# evaluations: what they are worth beside each other is what counts, since the first jobs of a run say how
# fast it is. What is the same for every model is all start.
SECONDS = {
    **{"run_config": Seconds(0.8), "model": Seconds(5.0), "capture": Seconds(4.5, 0.8)},
    **{"metrics": Seconds(0.8, 0.6), "calibrate": Seconds(4.0, 6.0), "dense": Seconds(5.5)},
    **{"evaluate": Seconds(5.5), "search": Seconds(5.7), "output_error": Seconds(5.0, 2.5)},
    **{
        "sensitivity": Seconds(5.0, 12.0),
        "answers": Seconds(5.5, 1.5),
        "speed": Seconds(5.0, 55.0),
    },
    **{"truthfulness": Seconds(1.0, 2.0), "curve": Seconds(1.1), "model_summary": Seconds(0.7)},
    **{"tables": Seconds(0.8, 1.5), "figures": Seconds(2.0, 11.2), "page": Seconds(2.0, 4.8)},
}
# An evaluation of a model of the mean size; in a dense baseline, where all is counted, it takes more.
EVALUATION, DENSE = 3.0, 1.25
# What these were measured with: the default run, the bytes of its tasks, and the zoo's mean size in bytes.
TASKS, CURVES, DATA, BYTES = 3, 15, 90e3, 6.3e6
# The share of an evaluation there that goes by the number of tasks, and not by their bytes.
EACH = 0.5
# Bytes of a document, by the file's suffix: of questions, and of a text's pages.
DOCUMENT = {".jsonl": 400.0, ".json": 400.0, ".arrow": 500.0, ".parquet": 200.0, ".csv": 300.0}
DOCUMENT |= {".txt": 20e3}
SOME = 100  # lines that tell how long the others are
# The work of tables, figures and page goes by this power of the number of curves.
SHOWN = 0.8
# And of a curve, for any number of tasks.
CURVE = 0.7
# The share of work that is the same for a model of any size.
SAME = 0.2
# And of an output error, however many predictors are tried, and what is left of it where it looks at one
# layer: SmolLM2-135M's on an H200, which take some 27 s to start, take 30 of one layer, 45 of all, 75 of four
# tensors, and 120 with three predictors.
PASS, ONE_LAYER = 0.3, 0.3
# Seconds a byte until weights are loaded, and numbers a byte beside 16 bits: a GGUF file's are worked out.
LOADING, GGUF_LOADING, GGUF_NUMBERS = 2e-9, 5e-8, 3.5
# A request of a masked-diffusion model is as many rows as it has samples; short answers have fewer. With
# eight samples the zoo's takes 6.2 times as long as its causal twin.
SAMPLE = 0.65


def key_of(job: Job) -> Key:
    """What a job is found by."""
    criterion, site = job.node or ("", job.site)
    return Key(job.rule, job.model, criterion, site, job.task)


def save(
    results: Path,
    config: Config,
    every: Sequence[Job],
    seconds: Sequence[Amount],
    starts: Sequence[float],
) -> None:
    """Keep a forecast among the workflow's logs, for the run that follows it.

    Args:
        results: folder of the results.
        config: the forecast's.
        every: its jobs.
        seconds: of each.
        starts: seconds of each until it begins what it is for.
    """
    path = results / FILE
    if not path.parent.is_dir():
        return  # asked for outside of a workflow, which leaves nothing behind
    known = []
    for job, amount, begin in zip(every, seconds, starts, strict=True):
        if not job.done and amount.complete:
            start = min(begin, amount.expected)
            known.append(vars(key_of(job)) | vars(Seconds(start, amount.expected - start)))
    write_manifest(path, {"config": _digest(config), "jobs": known})


def expected(config: Config, results: Path) -> list[tuple[Key, Seconds]]:
    """Seconds of each job that is still to be done.

    Args:
        config: of the run.
        results: its folder.

    Raises:
        AtlasError: a damaged manifest among the results.
    """
    planned = _planned(results / FILE, config)
    left = [job for job in jobs(config, results) if not job.done]
    facts = _facts(config)
    asked = {task for job in left for task in job.evaluations}
    data = {task: _data(task, config.tasks[task]) for task in asked}
    usual = [_usual_seconds(job, facts.get(job.model, _Facts()), data, config) for job in left]
    # What was not planned is put on the scale of what was.
    both: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for job, seconds in zip(left, usual, strict=True):
        if (key := key_of(job)) in planned:
            for rule in (job.rule, ""):
                both[rule][0] += planned[key].total
                both[rule][1] += seconds.total

    def on_scale(job: Job, seconds: Seconds) -> Seconds:
        found, own = both.get(job.rule) or both.get("") or (1.0, 1.0)
        return planned.get(key_of(job), seconds * (found / own))

    return [(key_of(job), on_scale(job, own)) for job, own in zip(left, usual, strict=True)]


def at_once(config: Config, cores: int) -> tuple[int, int]:
    """Jobs that run at once, and those of them with a model, as far as this machine's GPUs let.

    Args:
        config: of the run.
        cores: that Snakemake was given, or jobs on a cluster.
    """
    gpus = visible_gpus() * gpu_shares() if config.device in ("auto", "cuda") else 0
    return cores, min(cores, gpus) if gpus else cores


def _digest(config: Config) -> str:
    return digest(json.loads(config.model_dump_json()))


def _planned(path: Path, config: Config) -> dict[Key, Seconds]:
    """The forecast that `plan` left, by job; nothing if it was of another configuration."""
    try:
        content = read_manifest(path) if path.is_file() else {}
    except AtlasError:
        return {}  # of an interrupted disk or another release: a run does not end for it
    if content.get("config") != _digest(config):
        return {}
    return {
        Key(*(one[name] for name in ("rule", "model", "criterion", "site", "task"))): Seconds(
            one["start"], one["work"]
        )
        for one in content["jobs"]
        if "start" in one  # an earlier release's have the whole seconds alone
    }


@dataclass(frozen=True)
class _Facts:
    """What the files of a model say of it.

    Attributes:
        loading: seconds until its weights are loaded.
        large: its bytes over the mean of all models.
        numbers: its parameters over those of the zoo's mean.
        rows: that it runs for a request.
    """

    loading: float = 0.0
    large: float = 1.0
    numbers: float = 1.0
    rows: float = 1.0


def _facts(config: Config) -> dict[str, _Facts]:
    """Of each model; one whose weights are not here is taken to be as large as the mean."""
    sizes = {name: _bytes(entry) for name, entry in config.models.items()}
    known = [size for size in sizes.values() if size]
    mean = sum(known) / len(known) if known else 1
    found = {}
    for name, entry in config.models.items():
        size, packed = sizes[name], entry.gguf is not None
        found[name] = _Facts(
            size * (GGUF_LOADING if packed else LOADING),
            (size or mean) / mean,
            size * (GGUF_NUMBERS if packed else 1.0) / BYTES if size else 1.0,
            1.0 if entry.diffusion is None else 1 + SAMPLE * entry.diffusion.samples,
        )
    return found


def _bytes(entry: ModelEntry) -> int:
    """Of a local model's weights; 0 where they are not known."""
    if entry.gguf is not None:
        file = Path(entry.path or "", entry.gguf)
        return file.stat().st_size if file.is_file() else 0
    if entry.path is None:
        return 0
    return sum(file.stat().st_size for file in Path(entry.path).glob("*.safetensors"))


def _data(name: str, entry: TaskEntry) -> float:
    """Bytes of a task's documents, as far as they are evaluated; as usual where there are no files."""
    found = find(entry.include, entry.task or name, entry.override)
    files = [path for path in found.all() if path.suffix in DOCUMENT]
    return float(sum(_read(path, entry.limit) for path in files)) or DATA / TASKS


def _read(path: Path, limit: int | None) -> float:
    """Bytes of a file that so many documents are."""
    size = path.stat().st_size
    if limit is None:
        return size
    document = DOCUMENT[path.suffix]
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            lines = [len(line) for line in islice(file, SOME)]
        document = sum(lines) / max(len(lines), 1)
    return min(size, limit * document)


def _much(data: Iterable[float]) -> float:
    """How much longer tasks of so many bytes each take than the default run's three."""
    each = list(data)
    return EACH * (1 + len(each)) / (1 + TASKS) + (1 - EACH) * sum(each) / DATA


def _usual_seconds(job: Job, facts: _Facts, data: Mapping[str, float], config: Config) -> Seconds:
    """By rule, evaluations, what is asked of the job beside them, and its model.

    Args:
        job: the job.
        facts: of its model.
        data: bytes of each task.
        config: of the run.
    """
    usual = SECONDS.get(job.rule, Seconds(1.0))
    if job.rule in LAST:
        shown = float((len(grid.curves(config)) / CURVES) ** SHOWN)
        return Seconds(usual.start, usual.work * shown)
    if job.rule in LIGHT:
        # They go by widths and have no GPU.
        if job.rule == "curve":
            tasks = len(grid.model_tasks(config, job.model))
            return usual * (CURVE + (1 - CURVE) * tasks / TASKS)
        much = len(TENSORS[job.site]) * _sized(facts.numbers) if job.rule == "metrics" else 1.0
        return Seconds(usual.start, usual.work * much)
    evaluations = max((amount.expected for amount in job.evaluations.values()), default=0.0)
    evaluations *= _much(data[task] for task in job.evaluations)
    once = EVALUATION * facts.rows * (DENSE if job.rule == "dense" else 1.0)
    work = usual.work * _passes(job, config) + once * evaluations
    return Seconds(usual.start + facts.loading, work * _sized(facts.large))


def _sized(large: float) -> float:
    return SAME + (1 - SAME) * large


def _passes(job: Job, config: Config) -> float:
    """How much longer an output error works than one of a tensor without predictors; of another job 1."""
    if job.rule != "output_error" or job.node is None:
        return 1.0
    if layers_named(job.node[1]):
        return ONE_LAYER  # or a few: how many the model has is not known here
    again = PASS + (1 - PASS) * passes_of_a_level(config, job)
    return again * (1 + len(tensors_at(job.node[1]))) / 2
