"""What a node's folder keeps of finished tasks: the sample table, and what was counted by expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.evaluation import expert_table
from sparsity_atlas.evaluation.expert_table import ExpertTable, read_experts
from sparsity_atlas.evaluation.samples import SCHEMA, SampleTable, read_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from sparsity_atlas.sparsify.counted_vectors import Slot


@dataclass
class Finished:
    """What a task comes to.

    Attributes:
        result: its entry in eval.json.
        samples: its rows of the sample table.
        experts: its rows of the table by expert.
    """

    result: dict[str, Any]
    samples: pa.Table
    experts: pa.Table

    @classmethod
    def failed(cls, reason: str) -> Finished:
        """A task that could not be run, or whose numbers broke."""
        result = {"status": "failed", "reason": reason}
        return cls(result, SCHEMA.empty_table(), expert_table.SCHEMA.empty_table())


@dataclass
class Kept:
    """The tables of a node's folder.

    Attributes:
        folder: of the node.
        samples: the sample table.
        experts: the table by expert; None for nodes that count nothing by expert.
        journals: of tasks that are not written yet.
    """

    folder: Path
    samples: SampleTable
    experts: ExpertTable | None
    journals: list[Path] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, slots: Sequence[Slot]) -> Kept:
        """What a folder holds of a node that counts these slots.

        Raises:
            AtlasError: a table is damaged, or of a newer format.
        """
        by_expert = expert_table.columns(slots)
        samples = read_samples(folder / "samples.parquet", [slot.columns() for slot in slots])
        experts = read_experts(folder / expert_table.NAME, by_expert) if by_expert else None
        return cls(folder, samples, experts)

    def has(self, name: str, fingerprint: str) -> bool:
        """Whether a task stands in all tables under this fingerprint."""
        found = [self.samples.tasks.get(name, {}).get("fingerprint")]
        found += [] if self.experts is None else [self.experts.tasks.get(name)]
        return set(found) == {fingerprint}

    def put(self, name: str, fingerprint: str, finished: Finished, journal: Path) -> None:
        """Take in a task, whose journal goes when it is written."""
        self.journals.append(journal)
        self.samples.tasks[name] = {"fingerprint": fingerprint, "result": finished.result}
        self.samples.rows[name] = finished.samples
        if self.experts is not None:
            self.experts.tasks[name] = fingerprint
            self.experts.rows[name] = finished.experts

    def write(self) -> None:
        """Write the tables, and only then remove the journals of what they have taken in, if there is any."""
        if not self.journals:
            return
        if self.experts is not None:
            self.experts.write(self.folder / expert_table.NAME)
        else:
            # Of a model that had experts, and stood under this name.
            (self.folder / expert_table.NAME).unlink(missing_ok=True)
        self.samples.write(self.folder / "samples.parquet")
        while self.journals:
            self.journals.pop().unlink(missing_ok=True)

    def by_expert(self) -> list[str]:
        """The tensors that are counted by expert."""
        return list(dict.fromkeys(slot[2] for slot in self.experts.slots)) if self.experts else []
