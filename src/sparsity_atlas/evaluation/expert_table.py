"""What a node counted by expert: one Parquet file, beside the per-sample table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsity_atlas.evaluation.headed_table import read_headed, write_headed
from sparsity_atlas.files.parquet import OtherColumns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_atlas.lm.usage import Usage
    from sparsity_atlas.sparsify.attach import Counter
    from sparsity_atlas.sparsify.counted_vectors import Slot

NAME = "experts.parquet"
COUNTS = ("tokens", "entries", "zeros")
SCHEMA = pa.schema(
    [
        ("task", pa.string()),  # key in the configuration
        ("phase", pa.string()),  # scoring, prompt or generation
        ("layer", pa.int64()),
        ("part", pa.string()),
        ("tensor", pa.string()),
        ("expert", pa.int64()),
        *((name, pa.int64()) for name in COUNTS),  # of the tokens that were routed to it
        *((f"unique_{name}", pa.int64()) for name in COUNTS),  # each token of a document once
    ]
)


def columns(slots: Sequence[Slot]) -> list[list[Any]]:
    """What the header says of each counted tensor: layer, part, tensor, experts, how many a token meets."""
    routed = [(slot.key, slot.routing) for slot in slots if slot.routing is not None]
    return [[*key, routing.experts, routing.each] for key, routing in routed]


def expert_rows(task: str, usage: Usage, counter: Counter) -> pa.Table:
    """A task's rows: each phase that it has, each counted tensor, each expert, those without tokens too.

    Args:
        task: its name.
        usage: `AtlasLM.usage` after the run.
        counter: that counted.
    """
    found = []
    for phase, sums in usage.by_expert.sums.items():
        for zeros, slot in zip(sums, counter.by_expert.slots, strict=False):
            assert slot.routing is not None, "only such slots are counted by expert"
            count, width = slot.routing.experts, slot.routing.width
            tokens = sums[counter.by_expert.tokens_row(slot)]
            numbers = (tokens, tokens * width, zeros)
            found.append(
                {
                    **{"task": [task] * count, "phase": [phase] * count},
                    **{name: [value] * count for name, value in slot.key._asdict().items()},
                    "expert": np.arange(count),
                    **{
                        f"{prefix}{name}": array[account, :count]
                        for account, prefix in enumerate(("", "unique_"))
                        for name, array in zip(COUNTS, numbers, strict=True)
                    },
                }
            )
    tables = [pa.table({name: one[name] for name in SCHEMA.names}, SCHEMA) for one in found]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


@dataclass
class ExpertTable:
    """Contents of `experts.parquet`.

    Attributes:
        slots: `columns` of what was counted.
        tasks: fingerprint of each task.
        rows: for each task its rows, of `SCHEMA`; none of a task that failed.
    """

    slots: list[list[Any]]
    tasks: dict[str, str] = field(default_factory=dict)
    rows: dict[str, pa.Table] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the table atomically; the same contents give the same bytes."""
        order = sorted(self.tasks)
        header = {"slots": self.slots, "tasks": {k: self.tasks[k] for k in order}}
        write_headed(path, header, [self.rows[name] for name in order])


def read_table(path: Path) -> ExpertTable:
    """Read a table.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """
    header, table = read_headed(path, SCHEMA, _check_header)
    table = table.replace_schema_metadata(None)
    rows = {name: table.filter(pc.equal(table["task"], name)) for name in header["tasks"]}
    return ExpertTable(header["slots"], header["tasks"], rows)


def _check_header(header: dict[str, Any]) -> None:
    """See that a header has the parts that its readers take for granted.

    Raises:
        KeyError, TypeError, ValueError: it has not.
    """
    for layer, part, tensor, experts, each in header["slots"]:
        numbers = all(isinstance(one, int) and one >= 0 for one in (layer, experts, each))
        if not (numbers and isinstance(part, str) and isinstance(tensor, str)):
            raise TypeError("slots are [layer, part, tensor, experts, how many a token meets]")
    tasks = header["tasks"]
    if not (isinstance(tasks, dict) and all(isinstance(one, str) for one in tasks.values())):
        raise TypeError("tasks have a fingerprint")


def read_experts(path: Path, slots: list[list[Any]]) -> ExpertTable:
    """The table at `path`; an empty one if there is none, or other slots or columns are in it.

    Raises:
        AtlasError: damaged, or of a newer format.
    """
    if not path.is_file():
        return ExpertTable(slots)
    try:
        found = read_table(path)
    except OtherColumns:
        return ExpertTable(slots)  # of another release, and as good as none
    return found if found.slots == slots else ExpertTable(slots)
