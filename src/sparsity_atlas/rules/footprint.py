"""What a job asks of a scheduler: memory and time, from what is known of its model when it is submitted.

These are resources and never params: a better estimate, or a second attempt, makes nothing anew. They
are for scheduling, so they err on the side of too much, and each further attempt asks for more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.files.whole import read_manifest

MIB = 2**20
# Python with torch and the libraries, beside the two Snakemake processes that a cluster's job runs in.
BASE_MIB = 3000
# Of a model of which nothing is known: its manifest is not written and its weights are not here.
UNKNOWN_WEIGHTS_MIB = 32000
# Weights are read at the checkpoint's precision and held at the computation's.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Tokens a sequence, where the configuration sets no limit; longer ones are rare in the usual tasks.
USUAL_LENGTH = 2048

# Layers of a batch that a capture holds (`capture.PENDING` tensors and the copies of those being written,
# in float32 at the most).
CAPTURE_COPIES = 4

LOOK_AGAIN_SECONDS = 1.0

BASE_MINUTES = 30
UNKNOWN_MINUTES = 240
# FLOP a second that a machine is trusted to reach, at the least.
RATES = {"cpu": 2e10, "gpu": 1e13}


@dataclass(frozen=True)
class Sizes:
    """Of a model.

    Attributes:
        parameters: all that are in memory.
        token_bytes: of one token's activations in the FFN that is running.
        layers: how many.
    """

    parameters: int
    token_bytes: int
    layers: int


class Needs:
    """Estimates for one configuration and one results folder."""

    def __init__(self, config: Config, results: str) -> None:
        self._config = config
        self._results = Path(results)
        self._sizes: dict[str, Sizes] = {}
        self._tokens: dict[str, int] = {}
        self._missing: dict[Path, float] = {}  # when it was last looked for

    def memory(self, model: str) -> int:
        """Host memory in MiB of a job that loads a model: parameters × type, and activations."""
        entry = self._config.models[model]
        sizes = self.sizes(model)
        if sizes is None:
            return BASE_MIB + _weights_before_manifest(entry.path)
        # `auto` is float32 on the CPU; with `device: cuda` a checkpoint is hardly ever wider than 16 bits.
        usual = "bfloat16" if self._config.device == "cuda" else "float32"
        weights = sizes.parameters * ITEM_BYTES[usual if entry.dtype == "auto" else entry.dtype]
        activations = 0
        if self._config.device != "cuda":  # else they never leave the GPU
            length = entry.max_length or USUAL_LENGTH
            activations = entry.batch_size * length * sizes.token_bytes
        return BASE_MIB + (weights + activations) // MIB

    def capture_memory(self, model: str) -> int:
        """The same of a capture, which copies the activations of a batch to the host."""
        sizes = self.sizes(model)
        if sizes is None:
            return self.memory(model)
        batch = self._config.models[model].batch_size * self._config.capture.sequence_length
        return self.memory(model) + batch * sizes.token_bytes * CAPTURE_COPIES // MIB

    def capture_minutes(self, model: str, passes: int = 1) -> int:
        """Minutes of a job that runs the captured tokens through a model, or through its FFNs, so often."""
        return self._minutes(model, self._config.capture.tokens * passes)

    def layer_by_layer_minutes(self, model: str, passes: int) -> int:
        """Minutes of a job that runs the captured tokens through a model so often for each layer."""
        sizes = self.sizes(model)
        return self.capture_minutes(model, passes * (sizes.layers if sizes else 1))

    def evaluation_minutes(self, model: str, nodes: int = 1) -> int:
        """Minutes of a job that runs a model's tasks so often, from the tokens of its dense baseline."""
        tokens = self.tokens(model)
        return UNKNOWN_MINUTES * nodes if tokens is None else self._minutes(model, tokens * nodes)

    def sizes(self, model: str) -> Sizes | None:
        """From the model's manifest; None as long as there is none."""
        if model not in self._sizes:
            manifest = self._manifest(model, "model.json")
            if manifest is None:
                return None
            factors = manifest["hidden"] + 3 * manifest["width"]
            self._sizes[model] = Sizes(
                manifest["parameters"]["loaded"], 4 * factors, manifest["layers"]
            )
        return self._sizes[model]

    def tokens(self, model: str) -> int | None:
        """Tokens of a model's tasks, as its dense baseline counted them; None before it has run."""
        if model not in self._tokens:
            manifest = self._manifest(model, "dense/eval.json")
            if manifest is None:
                return None
            tasks = manifest["tasks"].values()
            self._tokens[model] = sum(
                sum(task["tokens"].values()) for task in tasks if task["status"] == "ok"
            )
        return self._tokens[model]

    def _minutes(self, model: str, tokens: int) -> int:
        sizes = self.sizes(model)
        if sizes is None:
            return UNKNOWN_MINUTES
        rate = RATES["cpu" if self._config.device == "cpu" else "gpu"]
        return BASE_MINUTES + round(tokens * 2 * sizes.parameters / rate / 60)

    def _manifest(self, model: str, name: str) -> dict[str, Any] | None:
        path = self._results / model / name
        # Snakemake asks for each of thousands of ready jobs at once; a shared file system answers slowly.
        if time.monotonic() < self._missing.get(path, 0) + LOOK_AGAIN_SECONDS:
            return None
        if path.is_file():
            return read_manifest(path)
        self._missing[path] = time.monotonic()
        return None


def _weights_before_manifest(path: str | None) -> int:
    """MiB that a model will need that has no manifest yet: its files at float32, or a guess."""
    if path is None or not Path(path).is_dir():
        return UNKNOWN_WEIGHTS_MIB
    return sum(one.stat().st_size for one in Path(path).glob("*.safetensors")) * 2 // MIB


def levels_of(config: Config, curve: grid.Curve) -> int:
    """How many levels a curve has at most."""
    return len(curve.levels) + (config.search.max_levels if curve.auto else 0)
