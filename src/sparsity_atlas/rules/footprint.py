"""What a job asks of a scheduler: memory and time, from what is known of its model when it is submitted.

These are resources and never params: a better estimate, or a second attempt, makes nothing anew. They
are for scheduling, so they err on the side of too much, and each further attempt asks for more.
"""

from __future__ import annotations

import functools
import operator
import time
from pathlib import Path
from typing import Any

from sparsity_atlas.activations.layout import groups
from sparsity_atlas.calibrate.allocation_cost import ERROR_TOKENS, allocation, tokens_run
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.evaluation.ahead import MOST
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.devices import ITEM_BYTES, visible_gpus
from sparsity_atlas.models.memory import (
    MIB,
    Largest,
    Sizes,
    of_a_capture,
    of_a_pass,
    of_an_output_error,
)
from sparsity_atlas.rules import beside_gpu
from sparsity_atlas.rules.before_manifest import (
    PROVED_COPIES,
    PROVED_TOKENS,
    before_manifest,
    before_manifest_on_gpu,
    gguf_bytes,
)
from sparsity_atlas.terms import (
    ATTENTION_TENSORS,
    FFN,
    STORED,
    layers_named,
    parts_named,
    stored,
    tensors_at,
)

# A stage's process without its model, on a CPU, as measured: Python with torch and what else it imports.
BASE_MIB = {
    **{"models": 450, "capture": 500, "calibrate": 500, "output_error": 500, "sensitivity": 500},
    **{"dense": 700, "evaluate": 700, "search": 700, "answers": 700, "speed": 800},
}
# What each process holds on a GPU, for its context and libraries; for what it takes in host memory see
# `beside_gpu`. And what torch's allocator keeps for passes of other shapes, in passes and at most.
CUDA_DEVICE_MIB, KEPT_PASSES, MOST_KEPT = 700, 2, 1000 * MIB
PASSING = ("capture", "sensitivity", "dense", "evaluate", "search", "answers")
# Of each process that builds requests beside a dense baseline on a GPU, what is its own.
BUILDER_MIB = 250
# The two Snakemake processes that a cluster's job runs in.
SNAKEMAKE_MIB = 500
# Peaks on a CPU, and on the GPU itself, lie within this factor of what is expected (benchmarks/memory.py).
MARGIN = 1.25
# Tokens a sequence before a model's dense baseline has run, where the configuration sets no limit; longer
# ones are rare in the usual tasks.
USUAL_LENGTH = 2048
# Copies of a layer's captured tensor that a calibration makes.
CALIBRATED_COPIES = 4

LOOK_AGAIN_SECONDS = 1.0

BASE_MINUTES = 30
UNKNOWN_MINUTES = 240
# FLOP a second that a machine is trusted to reach, at the least.
RATES = {"cpu": 2e10, "gpu": 1e13}


class Needs:
    """Estimates for one configuration and one results folder."""

    def __init__(self, config: Config, results: str) -> None:
        self._config = config
        self._results = Path(results)
        self._sizes: dict[str, Sizes] = {}
        self._dense: dict[str, dict[str, Any]] = {}
        self._missing: dict[Path, float] = {}  # when it was last looked for
        # As `pick_device` will, on a machine like this one.
        self._on_gpu = config.device == "cuda" or (config.device == "auto" and visible_gpus() > 0)
        self._evolves = any(
            allocation(grid.criterion_slice(config, name)) == "evolutionary"
            for name in config.criteria
        )
        self._sites = functools.cache(functools.partial(grid.stored_sites, config))

    def memory(self, stage: str, model: str, site: str | None = None, threads: int = 1) -> int:
        """Host memory in MiB to ask for; see `host`. On a GPU a dense baseline's builders are beside it."""
        margin = 1 if self._on_gpu else MARGIN
        builders = min(threads - 1, MOST) if self._on_gpu and stage == "dense" else 0
        own = round(margin * self.host(stage, model, site))
        return own + builders * BUILDER_MIB + SNAKEMAKE_MIB

    def gpu_memory(self, stage: str, model: str, site: str | None = None) -> int:
        """Memory of a GPU in MiB to ask for; 0 where none is used, or nothing is known yet."""
        sizes = self.sizes(model)
        if sizes is None or self._config.device == "cpu":
            return 0
        item = self._item(model, "bfloat16")
        once = self._work(stage, model, sizes, site, "cuda")
        kept = min(KEPT_PASSES * once, MOST_KEPT) if stage in PASSING else 0
        work = MARGIN * (sizes.parameters * item + once) + kept
        return CUDA_DEVICE_MIB + round(work / MIB)

    def host(self, stage: str, model: str, site: str | None = None) -> int:
        """Host memory in MiB that a stage's process is expected to have at its peak.

        Args:
            stage: as `BASE_MIB` names it.
            model: of the catalogue.
            site: of the stage, if it has one.
        """
        entry = self._config.models[model]
        if self._on_gpu:
            return beside_gpu.of_a_process(stage, self._beside_gpu(stage, model))
        sizes, base = self.sizes(model), BASE_MIB[stage]
        if sizes is None:
            return base + before_manifest(entry.path, entry.gguf)
        dtype = self._dtype(model, "float32")
        weights = sizes.parameters * ITEM_BYTES[dtype]
        # Files are mapped while their numbers are copied.
        loading = weights + sizes.parameters * self._file_item(model)
        running = weights + self._work(stage, model, sizes, site, "cpu")
        if stage == "capture":
            running += self._held(model, dtype)
        if stage == "calibrate":
            running += self._kept(sizes)
        return base + max(loading, running) // MIB

    def _beside_gpu(self, stage: str, model: str) -> int:
        """MiB of host memory that a model costs which is on a GPU."""
        entry, sizes = self._config.models[model], self.sizes(model)
        if sizes is None:
            return before_manifest_on_gpu(entry.path, entry.gguf)
        # A checkpoint is hardly ever wider than 16 bits; a GGUF file's numbers become float32.
        dtype = self._dtype(model, "bfloat16" if entry.gguf is None else "float32")
        weights = sizes.parameters * ITEM_BYTES[dtype]
        if entry.gguf is None:
            loading = beside_gpu.of_loading(weights, sizes.parameters * self._file_item(model))
        else:  # of a file that is not here, a byte a number
            widest = sizes.vocabulary * sizes.hidden
            file = gguf_bytes(entry.path, entry.gguf) or sizes.parameters
            loading = beside_gpu.of_loading(weights, file, widest)
        read = grid.calibration_tokens(self._config) * sizes.width * 4 + self._kept(sizes)
        running = beside_gpu.of_running(
            stage,
            self._held(model, dtype) if stage == "capture" else 0,
            read,
            foretold=bool(self._config.studies.predictors),
        )
        if entry.device_map is not None:  # what the GPUs do not hold
            running += weights
        stays = entry.gguf is not None
        requests = beside_gpu.of_requests(stage, self.tokens(model) or 0)
        return (beside_gpu.of_a_job(loading, running, stays=stays) + requests) // MIB

    def _kept(self, sizes: Sizes) -> int:
        """Bytes of the dense model's log-probabilities, which an evolution compares with."""
        return ERROR_TOKENS * sizes.vocabulary * 4 if self._evolves else 0

    def _work(self, stage: str, model: str, sizes: Sizes, site: str | None, device: str) -> int:
        """Bytes beside the weights on the device where the model runs."""
        item = self._item(model, "bfloat16" if device == "cuda" else "float32")
        capture, entry = self._config.capture, self._config.models[model]
        length = capture.sequence_length
        tokens = entry.batch_size * length
        slots = self._slots(model, sizes, site)
        match stage:
            case "models":
                return PROVED_TOKENS * sizes.vocabulary * 4 * PROVED_COPIES
            case "capture":
                return of_a_pass(sizes, Largest(tokens, length, entry.batch_size), item, device, 0)
            case "sensitivity":
                return of_a_pass(sizes, Largest(tokens, length, tokens), item, device, slots)
            case "calibrate":
                captured = grid.calibration_tokens(self._config)
                read = captured * sizes.width * 4 * CALIBRATED_COPIES
                if not self._evolves:
                    return read
                largest = Largest(ERROR_TOKENS, length, ERROR_TOKENS)
                return max(read, of_a_pass(sizes, largest, item, device, slots))
            case "speed":
                # Transposed copies, and other ones of the maps that are timed by themselves.
                return 2 * sizes.parameters * item
            case "output_error":
                looked_at = max(capture.tokens - grid.calibration_tokens(self._config), length)
                error = of_an_output_error(sizes, looked_at, length, item)
                error += beside_gpu.FORETOLD_BYTES * bool(self._config.studies.predictors)
                if not self._config.studies.prompt_reuse:
                    return error
                largest = Largest(tokens, length, tokens)
                return error + of_a_pass(sizes, largest, item, device, slots)
        return of_a_pass(sizes, self.largest(model), item, device, slots)

    def _slots(self, model: str, sizes: Sizes, site: str | None) -> int:
        """Counted vectors of a token: of each part of each layer, those of a site or all."""
        tensors = tensors_at(site) if site else STORED
        attention = sum(stored(tensor) in ATTENTION_TENSORS for tensor in tensors)
        described = (self._manifest(model, "model.json") or {}).get("ffn", ())
        named = parts_named(site) if site else ()
        layers = layers_named(site) if site else ()
        parts = sum(
            (not named or one.get("part", FFN) in named) and (not layers or one["layer"] in layers)
            for one in described
        )
        count = len(layers) or sizes.layers
        return count * attention + (parts or count) * (len(tensors) - attention)

    def _held(self, model: str, dtype: str) -> int:
        capture, entry = self._config.capture, self._config.models[model]
        described = (self._manifest(model, "model.json") or {})["ffn"]
        arrays = [
            size
            for group in groups(described, self._sites(model)).values()
            for size in group.token_bytes(dtype)
        ]
        batch = entry.batch_size * capture.sequence_length
        return of_a_capture(arrays, batch, capture.tokens, pinned=self._on_gpu)

    def largest(self, model: str) -> Largest:
        """A model's largest batch: of all its tasks, once the dense baseline has run."""
        dense = self._read_dense(model)
        if dense is not None:
            # An earlier version's says nothing of it, and is about to be made anew.
            found = [task["largest"] for task in dense["tasks"].values() if "largest" in task]
            if found:
                return functools.reduce(operator.or_, (Largest(**one) for one in found))
        entry = self._config.models[model]
        length = entry.max_length or USUAL_LENGTH
        tokens = entry.batch_size * length
        return Largest(tokens, length, tokens, tokens * length)

    def _item(self, model: str, usual: str) -> int:
        return ITEM_BYTES[self._dtype(model, usual)]

    def _dtype(self, model: str, usual: str) -> str:
        dtype = self._config.models[model].dtype
        return usual if dtype == "auto" else dtype

    def _file_item(self, model: str) -> int:
        manifest = self._manifest(model, "model.json") or {}
        return ITEM_BYTES.get(str(manifest.get("dtype")), 4)

    def capture_minutes(self, model: str, passes: int = 1) -> int:
        """Minutes of a job that runs the captured tokens through a model, or through its FFNs, so often."""
        return self._minutes(model, self._config.capture.tokens * passes)

    def calibration_minutes(self, model: str, kind: str, tensors: int) -> int:
        """Minutes of a job that looks at captured tokens once, and runs what an allocation asks for.

        Args:
            model: of the catalogue.
            kind: the allocation, one of `terms.ALLOCATIONS`.
            tensors: of the site, in each layer.
        """
        sizes = self.sizes(model)
        layers = sizes.layers if sizes else 0  # without a manifest no minutes are known
        captured = grid.calibration_tokens(self._config)
        run = tokens_run(kind, layers, tensors, captured)
        return self._minutes(model, self._config.capture.tokens + run)

    def layer_by_layer_minutes(self, model: str, passes: int) -> int:
        """Minutes of a job that runs the captured tokens through a model so often for each layer."""
        sizes = self.sizes(model)
        return self.capture_minutes(model, passes * (sizes.layers if sizes else 1))

    def evaluation_minutes(self, model: str, nodes: int = 1) -> int:
        """Minutes of a job that runs a model's tasks so often, from the tokens of its dense baseline."""
        tokens = self.tokens(model)
        return UNKNOWN_MINUTES * nodes if tokens is None else self._minutes(model, tokens * nodes)

    def sizes(self, model: str) -> Sizes | None:
        """From the model's manifest; None as long as there is none, or an earlier version's."""
        if model not in self._sizes:
            manifest = self._manifest(model, "model.json")
            if manifest is None or "memory" not in manifest:
                return None
            self._sizes[model] = Sizes.of(manifest)
        return self._sizes[model]

    def tokens(self, model: str) -> int | None:
        """Tokens of a model's tasks, as its dense baseline counted them; None before it has run."""
        dense = self._read_dense(model)
        if dense is None:
            return None
        tasks = [task for task in dense["tasks"].values() if task["status"] == "ok"]
        return sum(sum(task["tokens"].values()) for task in tasks)

    def _read_dense(self, model: str) -> dict[str, Any] | None:
        if model not in self._dense:
            manifest = self._manifest(model, "dense/eval.json")
            if manifest is None:
                return None
            self._dense[model] = manifest
        return self._dense[model]

    def _minutes(self, model: str, tokens: int) -> int:
        sizes = self.sizes(model)
        if sizes is None:
            return UNKNOWN_MINUTES
        rate = RATES["cpu" if self._config.device == "cpu" else "gpu"]
        return BASE_MINUTES + round(tokens * 2 * (sizes.active or sizes.parameters) / rate / 60)

    def _manifest(self, model: str, name: str) -> dict[str, Any] | None:
        path = self._results / model / name
        # Snakemake asks for each of thousands of ready jobs at once; a shared file system answers slowly.
        if time.monotonic() < self._missing.get(path, 0) + LOOK_AGAIN_SECONDS:
            return None
        if path.is_file():
            return read_manifest(path)
        self._missing[path] = time.monotonic()
        return None


def levels_of(config: Config, curve: grid.Curve) -> int:
    """How many levels a curve has at most."""
    return len(curve.levels) + (config.search.most_levels if curve.auto else 0)
