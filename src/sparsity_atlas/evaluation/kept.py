"""What a node's folder keeps of finished tasks: the sample table, and what was counted beside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.evaluation import expert_table, step_table
from sparsity_atlas.evaluation.headed_table import CountTable, continued
from sparsity_atlas.evaluation.samples import SCHEMA, SampleTable, read_samples
from sparsity_atlas.evaluation.texts import text_table
from sparsity_atlas.files.whole import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from sparsity_atlas.sparsify.counted_vectors import Slot

# The tables beside the samples: those of counts by what eval.json calls them, and the texts, of which it
# does not speak.
TEXTS = "texts"
BESIDE = {"by_expert": expert_table, "by_step": step_table, TEXTS: text_table}


@dataclass
class Finished:
    """What a task comes to.

    Attributes:
        result: its entry in eval.json.
        samples: its rows of the sample table.
        counts: its rows of each table of `BESIDE`.
    """

    result: dict[str, Any]
    samples: pa.Table
    counts: dict[str, pa.Table]

    @classmethod
    def failed(cls, reason: str) -> Finished:
        """A task that could not be run, or whose numbers broke."""
        counts = {name: table.SCHEMA.empty_table() for name, table in BESIDE.items()}
        return cls({"status": "failed", "reason": reason}, SCHEMA.empty_table(), counts)


def _borrow(folder: Path, names: Sequence[str]) -> None:
    """Take over what a node has under another name of its site, if that is finished and this one not begun.

    Args:
        folder: of the node: .../{site}/{level}.
        names: all names of its site in this model.
    """
    if folder.parent.name not in names or (folder / "samples.parquet").exists():
        return
    for other in (folder.parents[1] / name / folder.name for name in names):
        if other != folder and (other / "eval.json").exists():
            # As they are written: the samples, which say what is finished, last.
            for name in (*(table.NAME for table in BESIDE.values()), "samples.parquet"):
                if (other / name).exists():
                    write_atomically(folder / name, partial(shutil.copy, other / name))


@dataclass
class Kept:
    """The tables of a node's folder.

    Attributes:
        folder: of the node.
        samples: the sample table.
        counts: those of `BESIDE` that the node has.
        journals: of tasks that are not written yet.
    """

    folder: Path
    samples: SampleTable
    counts: dict[str, CountTable]
    journals: list[Path] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        folder: Path,
        slots: Sequence[Slot],
        *,
        by_step: bool = False,
        texts: bool = False,
        names: Sequence[str] = (),
    ) -> Kept:
        """What a folder holds of a node that counts these slots.

        Args:
            folder: of the node.
            slots: what it counts.
            by_step: whether it counts masks over steps of denoising.
            texts: whether prompts and answers are kept.
            names: all names of its site in this model; what it has under another one is taken over.

        Raises:
            AtlasError: a table is damaged, or of a newer format.
        """
        _borrow(folder, names)
        samples = read_samples(folder / "samples.parquet", [slot.columns() for slot in slots])
        counts = {}
        for name, table in BESIDE.items():
            wanted = {"by_step": by_step, TEXTS: texts}.get(name, True)
            columns = table.columns(slots) if wanted else []
            if columns:
                counts[name] = continued(folder / table.NAME, columns, table.read_table)
        return cls(folder, samples, counts)

    def has(self, name: str, fingerprint: str) -> bool:
        """Whether a task stands in all tables under this fingerprint."""
        found = [self.samples.tasks.get(name, {}).get("fingerprint")]
        found += [table.tasks.get(name) for table in self.counts.values()]
        return set(found) == {fingerprint}

    def put(self, name: str, fingerprint: str, finished: Finished, journal: Path) -> None:
        """Take in a task, whose journal goes when it is written."""
        self.journals.append(journal)
        self.samples.tasks[name] = {"fingerprint": fingerprint, "result": finished.result}
        self.samples.rows[name] = finished.samples
        for kind, table in self.counts.items():
            table.tasks[name] = fingerprint
            table.rows[name] = finished.counts[kind]

    def write(self) -> None:
        """Write the tables, and only then remove the journals of what they have taken in, if there is any."""
        if not self.journals:
            return
        for name, table in BESIDE.items():
            if name in self.counts:
                self.counts[name].write(self.folder / table.NAME, private=name == TEXTS)
            else:
                # Of a model that had experts, or steps, and stood under this name.
                (self.folder / table.NAME).unlink(missing_ok=True)
        self.samples.write(self.folder / "samples.parquet")
        while self.journals:
            self.journals.pop().unlink(missing_ok=True)

    def counted(self) -> dict[str, list[str]]:
        """The tensors of each of the tables that the node has."""
        return {
            name: list(dict.fromkeys(slot[2] for slot in table.slots))
            for name, table in self.counts.items()
            if name != TEXTS
        }
