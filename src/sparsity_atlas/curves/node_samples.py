"""A node's samples as its curve wants them: what was counted at the site, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.samples import at_site, read_table, zeros_in
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.terms import PHASES

# Whose zeros are known before the other factor is made. Both maps have rows of the FFN's input's width.
FACTORS = ("up", "gate")
Profile = dict[str, list[float | None]]
"""Of each tensor a number for each layer; None: left dense."""


class NodeSamples:
    """One node's (or dense's) sample table, task by task."""

    def __init__(self, folder: Path, site: str) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder / "eval.json")
        header, self._table = read_table(folder / "samples.parquet")
        slots = header["slots"]
        self._slots = [i for i, slot in enumerate(slots) if at_site(slot, site)]
        self._tensors = [slot[0] for slot in slots]
        self._layers = [slot[1] for slot in slots]
        self._widths = np.array([slots[i][2] for i in self._slots])
        self._count = len(slots)

    def ok(self, task: str) -> bool:
        """Whether the task ran without NaN and infinity."""
        return bool(self.manifest["tasks"][task]["status"] == "ok")

    def fail(self, task: str, reason: str) -> None:
        """Take a task for failed that ran, where its metric cannot be read."""
        self.manifest["tasks"][task] = {"status": "failed", "reason": reason}

    def rows(self, task: str) -> pa.Table:
        """The task's rows, in the order of leaf and document, without empty documents."""
        wanted = pc.equal(self._table["task"], task)
        return self._table.filter(pc.and_(wanted, pc.greater(self._table["unique_tokens"], 0)))

    def outputs(self, task: str) -> np.ndarray:
        """How many weights meet an entry of each layer and tensor at the site, int64 [slots].

        Raises:
            AtlasError: the manifest is of a release that did not say.
        """
        shares = self.manifest["tasks"][task]["sparsity"]
        by_layer = {
            tensor: iter(self._said(shares[tensor], "outputs")) for tensor in set(self._tensors)
        }
        # Of all slots, of which a site may be confined to some.
        every = [next(by_layer[tensor]) for tensor in self._tensors]
        return np.array([every[i] for i in self._slots])

    def weights(self, task: str) -> int:
        """Weights that one token meets, and that need not be read where the site's entries are all zero.

        Of a gated FFN's factor, u or g, these are a row of the other factor's map and a column of W_d for
        each entry; of every other tensor those that its entries meet.

        Raises:
            AtlasError: the manifest is of a release that did not say.
        """
        rows = np.array([2 if self._tensors[i] in FACTORS else 1 for i in self._slots])
        return int((self._widths * self.outputs(task) * rows).sum())

    def cut(self, task: str) -> dict[str, int]:
        """How many of the task's items were cut to the model's context, and how.

        Raises:
            AtlasError: the manifest is of a release that did not say.
        """
        cut: dict[str, int] = self._said(self.manifest["tasks"][task], "cut")
        return cut

    def _said(self, content: dict[str, Any], key: str) -> Any:
        if key not in content:
            raise AtlasError(
                f"{self.folder}/eval.json: of an earlier release; delete it and run again"
            )
        return content[key]

    def zeros(
        self, rows: pa.Table, counts: np.ndarray | int = 1, phases: Sequence[str] = PHASES
    ) -> np.ndarray:
        """Zeros of each sample at the site, int64 [rows].

        Args:
            rows: the samples.
            counts: int64 [slots], how often an entry counts.
            phases: in which they are counted.
        """
        total = np.zeros(len(rows), dtype=np.int64)
        for phase in phases:
            total += (zeros_in(rows, phase, self._count)[:, self._slots] * counts).sum(1)
        return total

    def entries(
        self, rows: pa.Table, counts: np.ndarray | int = 1, phases: Sequence[str] = PHASES
    ) -> np.ndarray:
        """Entries of each sample at the site, int64 [rows]; arguments as those of `zeros`."""
        tokens = np.sum([rows[f"{phase}_tokens"].to_numpy() for phase in phases], axis=0)
        entries: np.ndarray = tokens * int((self._widths * counts).sum())
        return entries

    def by_layer(self, rows: pa.Table, phase: str) -> Profile:
        """Induced sparsity in a phase at the site."""
        tokens = int(rows[f"{phase}_tokens"].to_numpy().sum())
        zeros = zeros_in(rows, phase, self._count)[:, self._slots].sum(0)
        places = [(self._tensors[slot], self._layers[slot]) for slot in self._slots]
        found: Profile = {}
        for tensor in dict.fromkeys(tensor for tensor, _ in places):
            # A layer's parts that have the tensor are one.
            sums = np.zeros((2, 1 + max(layer for name, layer in places if name == tensor)))
            for (name, layer), count, width in zip(places, zeros, self._widths, strict=True):
                if name == tensor:
                    sums[:, layer] += count, tokens * width
            found[tensor] = [
                float(count / entries) if entries else None for count, entries in sums.T
            ]
        return found


def phases_of(rows: pa.Table) -> list[str]:
    """Phases in which some samples have tokens."""
    return [phase for phase in PHASES if rows[f"{phase}_tokens"].to_numpy().any()]
