"""The table of `examples/activation_functions.py`, from small tables whose numbers can be worked out."""

import runpy
from pathlib import Path

import pandas as pd
import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).parents[4] / "examples" / "activation_functions.py"))


def masks(model: str, level: str, sparsity: float, unused: float, reuse: float) -> list[dict]:
    place = {"model": model, "criterion": "topp", "site": "intermediate", "level": level}
    values = [
        ("unused", 1, sparsity, sparsity),
        ("unused", 8, unused, sparsity**8),
        ("reuse", 1, reuse, 1 - sparsity),
        ("reuse", 8, 0.0, 0.0),
    ]
    names = ("quantity", "at", "value", "independent")
    return [place | dict(zip(names, row, strict=True)) for row in values]


@pytest.fixture
def results(tmp_path):
    curve = {"criterion": "topp", "site": "intermediate", "kind": "loss", "bar": 0.99}
    critical = [
        curve | dict(zip(("model", "relation", "value", "dense_value"), row, strict=True))
        for row in (("plain", "=", 0.45, 3.5), ("relu", "=", 0.9, 3.6), ("never", ">=", 0.99, 4.0))
    ]
    critical.append(critical[0] | {"site": "gate", "value": 0.1})
    critical.append(critical[0] | {"bar": 0.95, "value": 0.7})
    for row in critical:
        row |= {"interval_low": row["value"] - 0.02, "interval_high": row["value"] + 0.02}
    metrics = [
        {"model": model, "tensor": tensor, "layer": layer, "exact_zero": zero, "at_most_zero": most}
        for model, tensor, layer, zero, most in (
            *(("plain", "intermediate", 0, 0.0, 0.5), ("plain", "gate", 0, 0.0, 0.7)),
            *(("relu", "intermediate", 0, 0.7, 0.9), ("relu", "intermediate", 1, 0.8, 0.7)),
            *(("relu", "gate", 0, 0.75, 0.77), ("never", "intermediate", 0, 0.0, 0.25)),
        )
    ]
    kept = [
        *masks("plain", "0.9", 0.4, 0.1, 0.7),
        *masks("plain", "0.8", 0.6, 0.3, 0.5),
        *masks("relu", "exact", 0.75, 0.2, 0.4),
        *masks("relu", "0.9", 0.9, 0.5, 0.3),
        *masks("never", "0.9", 0.4, 0.1, 0.7),
    ]
    models = [
        {"model": "plain", "activation": "silu", "sites": "input up gate intermediate"},
        {"model": "relu", "activation": "relu", "sites": "input up gate intermediate"},
        {"model": "never", "activation": "gelu", "sites": "input intermediate"},
    ]
    for name, rows in {
        **{"critical_sparsity": critical, "metrics": metrics, "masks": kept, "models": models}
    }.items():
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


def test_a_row_is_what_the_tables_say_at_the_models_own_sparsity(results):
    table = EXAMPLE["table"](results, "topp").set_index("model")
    assert list(table.index) == ["plain", "relu", "never"]
    plain, relu, never = (table.loc[name] for name in table.index)
    assert (plain["loss"], plain["zeros"], plain["at_most_zero"]) == (3.5, 0, 0.7)
    # A quarter of the way between its two levels.
    assert plain["unused_8"] == pytest.approx(0.15)
    assert plain["reuse"] == pytest.approx(0.65)
    assert plain["independent_reuse"] == pytest.approx(0.55)
    assert plain["independent_unused_8"] == pytest.approx(0.75 * 0.4**8 + 0.25 * 0.6**8)
    assert plain[["unused_8_exact", "reuse_exact"]].isna().all()
    assert (relu["zeros"], relu["at_most_zero"]) == (0.75, 0.77)
    assert (relu["unused_8"], relu["reuse"]) == (0.5, 0.3)
    assert (relu["unused_8_exact"], relu["independent_reuse_exact"]) == (0.2, 0.25)
    assert not never["gated"]
    assert never["at_most_zero"] == 0.25
    # It never crosses the bar, so that there is no sparsity to read anything at.
    assert never[["ppl_1", "unused_8", "reuse"]].isna().all()


def test_the_table_for_people_is_in_per_cent(results):
    lines = EXAMPLE["markdown"](EXAMPLE["table"](results, "topp")).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith(
        "| plain | silu, gated | 3.500 | 0.0 | 70.0 | 45.0 (43.0-47.0) | 15.0 ("
    )
    assert lines[4].startswith("| never | gelu, no gate | 4.000 | 0.0 | 25.0 |  |")
