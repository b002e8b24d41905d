"""steps.parquet as a node of a masked-diffusion model leaves it, with masks that drift."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparsity_atlas.evaluation.headed_table import CountTable
from sparsity_atlas.evaluation.step_table import NAME, columns, step_rows
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.sparsify.step import Step
from sparsity_atlas.sparsify.step_counts import ByStep
from sparsity_atlas.sparsify.step_sums import StepSums, step_record
from sparsity_atlas.terms import TENSORS, PlaceKey, plain

PROMPT, ANSWER, WIDTH = 3, 6, 32


class _Rows:
    """What `ByStep` wants to know of a tensor's vectors."""

    def __init__(self, key: PlaceKey) -> None:
        self.key = key

    def of_each(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return rows.unsqueeze(2), None


def write_steps(
    node: Path, tasks: Sequence[str], site: str, share: float, layers: int, steps: int = ANSWER
) -> None:
    """A node's eval.json and steps.parquet: a row's masks, of which some entries change in each step.

    Args:
        node: its folder.
        tasks: their names.
        site: of it.
        share: sparsity.
        layers: of the model.
        steps: of each generation, at most a token each.
    """
    tensors = TENSORS[plain(site)]
    slots = [
        Slot(PlaceKey(layer, "ffn", tensor), WIDTH, 4)
        for layer in range(layers)
        for tensor in tensors
    ]
    rows = {}
    for task in tasks:
        rng = np.random.default_rng(zlib.crc32(f"{node} {task}".encode()))
        by_step, sums = ByStep(slots), StepSums(slots)
        place = torch.arange(PROMPT + ANSWER)[None]
        values = {slot: rng.random((1, PROMPT + ANSWER, WIDTH)) for slot in slots}
        for step in range(steps):
            valid, prompt = torch.ones_like(place, dtype=torch.bool), place < PROMPT
            by_step.announce(Step(step, (0,), prompt, place >= PROMPT + step), valid)
            for slot, own in values.items():
                drifts = rng.random(own.shape) < 0.05 * (1 + slot.key.layer)
                own[drifts] = rng.random(int(drifts.sum()))
                kept = torch.from_numpy(own >= share * (1 - 0.02 * step))
                by_step.add(_Rows(slot.key), kept)  # type: ignore[arg-type]
        sums.add(step_record([one.numpy() for one in by_step.take()]))
        rows[task] = step_rows(task, sums)
    CountTable(columns(slots), dict.fromkeys(tasks, "f"), rows).write(node / NAME)
    names = {"by_step": list(tensors), "fingerprints": dict.fromkeys(tasks, "f")}
    write_manifest(node / "eval.json", {"tasks": {}, **names})
