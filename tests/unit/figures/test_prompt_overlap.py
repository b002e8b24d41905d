"""Figures of prompts' masks and of layers under one threshold draw what their tables have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.figures.studies import layer_profile, prompt_overlap
from sparsity_atlas.figures.style import NothingToShow
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.studies.prompt_table import SCHEMA
from sparsity_atlas.tables.read import Tables
from sparsity_atlas.tables.studies.profile import profile_rows


def rows_of(level: str, sparsity: float) -> list[dict[str, Any]]:
    """Two layers, and two spans behind the prompt."""
    key = {"level": level, "continuation": "given"}
    found: list[dict[str, Any]] = []
    for layer in (0, 1):
        place = {**key, "part": "ffn", "tensor": "intermediate", "layer": layer}
        found.append(
            {
                **place,
                "quantity": "sparsity",
                "nearest": 1,
                "farthest": 3,
                "value": sparsity,
                "low": None,
            }
        )
        for first, last, value in ((1, 1, 0.6), (2, 3, 0.5), (1, 3, 0.53)):
            span = {"nearest": first, "farthest": last, "chance": 1 - sparsity}
            own = value + 0.1 * layer
            ends = {"low": own - 0.05, "high": own + 0.05}
            found.append({**place, **span, **ends, "quantity": "overlap", "value": own})
            found.append({**place, **span, **ends, "quantity": "overlap_another", "value": own / 2})
    for first, last in ((1, 1), (2, 3), (1, 3)):
        for number, name in enumerate(("reuse", "own", "another")):
            value = 0.1 * first + 0.01 * number
            row = {**key, "quantity": f"added_by_{name}", "nearest": first, "farthest": last}
            found.append({**row, "value": value, "low": value / 2, "high": 2 * value})
    return found


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder: Path = tmp_path_factory.mktemp("prompts")
    make_results(folder, {"m": {}}, criteria=("topk", "topp"), sites=("intermediate",))
    table = pa.Table.from_pylist([*rows_of("0.9", 0.1), *rows_of("0.5", 0.45)], SCHEMA)
    write_parquet(folder / "m/topk/intermediate/prompt_reuse.parquet", table)
    return make_tables(folder)


def lines(ax: Any) -> list[list[tuple[float, float]]]:
    found = [line for line in ax.lines if line.get_marker() not in ("None", None)]
    return [[(float(x), round(float(y), 9)) for x, y in line.get_xydata()] for line in found]


def test_overlaps_at_the_level_nearest_to_one_half(tables: Tables) -> None:
    (ax,) = prompt_overlap.overlap(tables).axes
    assert ax.get_title().endswith("topk 0.5, given")
    assert lines(ax) == [[(1, 0.65), (2, 0.55)], [(1, 0.325), (2, 0.275)]]
    (ax,) = prompt_overlap.by_layer(tables).axes
    assert lines(ax) == [[(0, 0.53), (1, 0.63)], [(0, 0.265), (1, 0.315)]]


def test_losses_of_three_kinds_of_masks(tables: Tables) -> None:
    (ax,) = prompt_overlap.losses(tables).axes
    assert lines(ax) == [
        [(1, 0.1), (2, 0.2)],
        [(1, 0.11), (2, 0.21)],
        [(1, 0.12), (2, 0.22)],
    ]


def test_what_was_not_asked_for_is_said(tables: Tables) -> None:
    none = replace(tables, prompt_reuse=tables.prompt_reuse[:0])
    for draw in (prompt_overlap.overlap, prompt_overlap.by_layer, prompt_overlap.losses):
        assert isinstance(draw(none), NothingToShow)
    alone = tables.layer_profile[tables.layer_profile["criterion"] == "topk"]
    assert isinstance(
        layer_profile.layer_profile(replace(tables, layer_profile=alone)), NothingToShow
    )


def test_a_profile_lies_between_the_levels() -> None:
    """Means .1, .4 and .8; at .5 a quarter of the way, at .1 to .8 alone anything is known."""
    layers = {
        "3": {"gate": [1.0, 0.6, None]},
        "1": {"gate": [0.2, 0.0, None]},
        "2": {"gate": [0.6, 0.2, None]},
    }
    key = {"model": "m", "criterion": "c", "site": "gate"}
    found = {(row["mean_sparsity"], row["layer"]): row for row in profile_rows(key, layers)}
    assert sorted({mean for mean, _ in found}) == [0.1 * tenths for tenths in (1, 2)] + [
        round(0.1 * tenths, 1) for tenths in range(3, 9)
    ]
    assert {layer for _, layer in found} == {0, 1}
    assert found[0.5, 0]["sparsity"] == pytest.approx(0.7)
    assert found[0.5, 1]["sparsity"] == pytest.approx(0.3)
    assert found[0.8, 0]["sparsity"] == 1
    assert list(profile_rows(key, {"1": {"gate": [None, None]}})) == []
    # Where every task of a level failed nothing was counted.
    with_failed = list(profile_rows(key, {"0": {}, **layers}))
    assert with_failed == list(profile_rows(key, layers))


def test_a_profile_is_drawn_where_most_criteria_drop_as_much(tables: Tables) -> None:
    (ax,) = layer_profile.layer_profile(tables).axes
    assert ax.get_title().endswith("intermediate, 50% on the average")
    rows = tables.layer_profile
    own = rows[(rows["mean_sparsity"] == 0.5) & (rows["criterion"] == "topp")]
    expected = [
        (float(one.layer), round(one.sparsity, 9)) for one in pd.DataFrame(own).itertuples()
    ]
    assert lines(ax) == [expected, expected]


def test_a_legend_names_what_is_drawn(tables: Tables) -> None:
    """A criterion that nowhere drops as much as another has no line."""
    rows = tables.layer_profile
    other = rows[rows["criterion"] == "topp"].assign(
        criterion="third", site="input", tensor="input"
    )
    curves = pd.concat([tables.curves, tables.curves.assign(criterion="third")])
    with_third = replace(tables, layer_profile=pd.concat([rows, other]), curves=curves)
    (legend,) = layer_profile.layer_profile(with_third).legends
    assert [text.get_text() for text in legend.texts] == ["topk", "topp"]
