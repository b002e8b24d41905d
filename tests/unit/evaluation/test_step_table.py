"""steps.parquet: its rows, what is null, and what its header says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.headed_table import CountTable, continued, write_headed
from sparsity_atlas.evaluation.step_table import NAME, SCHEMA, columns, read_table, step_rows
from sparsity_atlas.sites.part import Routing
from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.sparsify.step_sums import (
    BINS,
    BLOCK_SUMS,
    BLOCKS,
    REGIONS,
    TOKEN_SUMS,
    StepSums,
    step_record,
)
from sparsity_atlas.terms import PlaceKey

STEPS = 3
SLOTS = [
    Slot(PlaceKey(0, "ffn", "input"), 10, 4),
    Slot(PlaceKey(1, "experts", "up"), 20, 4, Routing(8, 2, 10), of_experts=True),
]


@pytest.fixture
def sums() -> StepSums:
    found = StepSums(SLOTS)
    draw = torch.Generator().manual_seed(1)
    shapes = [
        (STEPS, len(REGIONS) + len(BLOCKS)),
        (STEPS, len(SLOTS), len(TOKEN_SUMS), len(REGIONS)),
        (STEPS, len(SLOTS), len(BLOCK_SUMS), len(BLOCKS)),
        (len(SLOTS), BINS, len(BLOCKS)),
    ]
    numbers = [torch.randint(0, 1 << 30, shape, generator=draw).numpy() for shape in shapes]
    found.add(step_record(numbers))
    # Of the neurons of two prompts and three answers each has one frequency.
    for place, slot in enumerate(SLOTS):
        found.over[place] = 0
        found.over[place, 0] = slot.neurons * np.array([2, 3]) - 5
        found.over[place, 4] = 5
    return found


def records(sums: StepSums) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = step_rows("t", sums).to_pylist()
    found = {(row["layer"], row["region"], row["step"]): row for row in rows}
    assert len(found) == len(rows) == len(SLOTS) * (5 * STEPS + 2)
    return found


def test_rows(sums: StepSums) -> None:
    found = records(sums)
    for place, slot in enumerate(SLOTS):
        for step in range(STEPS):
            for number, region in enumerate(REGIONS):
                row = found[slot.key.layer, region, step]
                assert (row["task"], row["part"], row["tensor"]) == ("t", *slot.key[1:])
                assert row["tokens"] == sums.tokens[step, number]
                assert row["entries"] == row["tokens"] * slot.width
                for at, name in enumerate(TOKEN_SUMS):
                    compared = name == "kept" or step > 0
                    wanted = sums.of_tokens[step, place, at, number] if compared else None
                    assert row[name] == wanted
            answer = found[slot.key.layer, "answer", step]
            for name in ("tokens", "entries", "kept", "first_both", "previous_jaccard"):
                each = [found[slot.key.layer, region, step][name] for region in REGIONS[1:]]
                assert answer[name] == (None if None in each else sum(each))
            for block, region in enumerate(BLOCKS):
                row = found[slot.key.layer, region, step]
                assert row["generations"] == sums.rows[step, block]
                assert row["neurons"] == row["generations"] * (10 if place == 0 else 80)
                for at, name in enumerate(BLOCK_SUMS):
                    compared = not name.startswith(("previous_", "first_")) or step > 0
                    wanted = sums.of_blocks[step, place, at, block] if compared else None
                    assert row[name] == wanted
            assert found[slot.key.layer, "masked", step]["neurons"] is None


def test_all_steps_together(sums: StepSums) -> None:
    found = records(sums)
    for slot in SLOTS:
        for block, region in enumerate(BLOCKS):
            row = found[slot.key.layer, region, None]
            steps = [found[slot.key.layer, region, step] for step in range(STEPS)]
            for name in ("tokens", "entries", "kept"):
                assert row[name] == sum(one[name] for one in steps)
            assert row["generations"] == 2 + block
            assert row["neurons"] == (2 + block) * slot.neurons
            assert (row["used"], row["frequency_4"]) == (5, 5)
            assert row["previous_both"] is row["first_used"] is None


def test_of_no_steps_there_are_no_rows() -> None:
    assert step_rows("t", StepSums(SLOTS)).num_rows == 0


def test_file(sums: StepSums, tmp_path: Path) -> None:
    path = tmp_path / NAME
    rows = step_rows("t", sums)
    CountTable(columns(SLOTS), {"t": "f", "u": "g"}, {"t": rows, "u": rows[:0]}).write(path)
    table = read_table(path)
    assert table.slots == [[0, "ffn", "input", 10, 10], [1, "experts", "up", 20, 80]]
    assert table.tasks == {"t": "f", "u": "g"}
    assert table.rows["t"].equals(rows)
    content = path.read_bytes()
    table.write(path)
    assert path.read_bytes() == content
    assert continued(path, columns(SLOTS), read_table).tasks == table.tasks
    assert continued(path, columns(SLOTS[:1]), read_table).tasks == {}


@pytest.mark.parametrize("slot", [[0, "ffn", "input", 10, -1], [0, "ffn", 3, 10, 10]])
def test_a_damaged_header(tmp_path: Path, slot: list[Any]) -> None:
    path = tmp_path / NAME
    write_headed(path, {"slots": [slot], "tasks": {}}, [SCHEMA.empty_table()])
    with pytest.raises(AtlasError, match="damaged table"):
        read_table(path)


def test_documented_columns_are_those_of_the_file() -> None:
    text = (Path(__file__).parents[3] / "docs/results.md").read_text(encoding="utf-8")
    section = text.split("/steps.parquet`\n")[1].split("\n###")[0]
    named = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert named == SCHEMA.names
