"""Which cheap number foretells the dear one, from rows by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.figures.studies.rank_correlations import foretelling
from sparsity_atlas.figures.style import NothingToShow
from sparsity_atlas.tables.foretelling import CHEAP, Foretelling

SIZES = {f"m{place}": 10**place for place in range(12)}


def critical(model: str, value: float, **other: Any) -> dict[str, Any]:
    return {
        **{"model": model, "criterion": "topp", "site": "input", "bar": 0.99, "relation": "="},
        **{"kind": "loss", "task": "prose", "value": value},
        "non_embedding_parameters": SIZES[model],
        **other,
    }


def stored(model: str, value: float, layer: int = 0) -> dict[str, Any]:
    return {"model": model, "tensor": "input", "layer": layer, "gini": value, "hoyer": None}


def found(collected: Foretelling) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["measure"], row["site"], row["metric"]): row for row in collected.rows()}


def test_a_metric_that_orders_the_models_as_the_sparsity_does() -> None:
    collected = Foretelling()
    for place, model in enumerate(SIZES):
        collected.add_critical([critical(model, 0.3 + place / 100)])
        # The mean over the layers falls, its first layer alone does not.
        collected.add_metrics([stored(model, 0.5, 0), stored(model, -place, 1)])
    rows = found(collected)
    gini = rows["ppl_sparsity", "input", "gini"]
    assert (gini["correlation"], gini["high"]) == (pytest.approx(-1), pytest.approx(-1))
    assert (gini["models"], gini["points"], gini["resolved"]) == (12, 12, True)
    size = rows["ppl_sparsity", "input", "non_embedding_parameters"]
    assert (size["correlation"], size["resolved"], size["reason"]) == (pytest.approx(1), True, "")
    hoyer = rows["ppl_sparsity", "input", "hoyer"]
    assert (hoyer["correlation"], hoyer["models"]) == (None, 0)
    assert not any(measure == "critical_sparsity" for measure, _, _ in rows)


def test_few_models_and_crossings_that_were_not_seen() -> None:
    collected = Foretelling()
    for place, model in enumerate(list(SIZES)[:6]):
        beyond = {"relation": ">="} if place == 5 else {}
        accuracy = {"kind": "accuracy", "task": "average"}
        collected.add_critical(
            [
                critical(model, 0.3 + place / 100, **beyond),
                critical(model, 0.9 - place / 100, task="other"),
                critical(model, 0.3, bar=0.95),
                *([critical(model, 0.5 + place / 100, **accuracy)] if place < 4 else []),
            ]
        )
    rows = found(collected)
    size = rows["ppl_sparsity", "input", "non_embedding_parameters"]
    assert (size["models"], size["resolved"]) == (6, False)
    assert size["reason"] == "fewer than 10 models"
    few = rows["critical_sparsity", "input", "non_embedding_parameters"]
    assert (few["models"], few["correlation"], few["reason"]) == (4, None, "fewer than 5 models")


def test_what_the_captured_text_shows_is_read_at_one_half() -> None:
    collected = Foretelling()
    rng = np.random.default_rng(0)
    errors = {}
    for model in SIZES:
        key = (model, "topp", "input")
        errors[model] = rng.random()
        levels = [
            {"level": "0.9", "sparsity": 0.4, "error": errors[model] - 0.1, "part": None},
            {"level": "0.5", "sparsity": 0.6, "error": errors[model] + 0.1, "part": None},
            {"level": "0.5", "sparsity": 0.6, "error": 77.0, "part": "experts"},
        ]
        masks = [
            {"quantity": "reuse", "at": 1, "level": level, "value": value}
            for level, value in (("0.9", 1.0), ("0.5", 2 * errors[model]), ("exact", 9.0))
        ]
        collected.add_captured(key, levels, masks)
        collected.add_critical([critical(model, errors[model])])
    rows = found(collected)
    assert rows["ppl_sparsity", "input", "output_error"]["correlation"] == pytest.approx(1)
    assert rows["ppl_sparsity", "input", "reuse"]["correlation"] == pytest.approx(1)
    assert rows["ppl_sparsity", "input", "unused_of_8"]["models"] == 0


def test_of_a_run(tmp_path: Path) -> None:
    models = {name: {"parameters": 1000 * (place + 1)} for place, name in enumerate("abcde")}
    make_results(tmp_path, models)
    tables = make_tables(tmp_path)
    rows = tables.foretelling
    assert set(rows["site"]) == {"intermediate", "input", "all"}
    assert set(rows["metric"]) == set(CHEAP)
    pooled = rows.query("site == 'all' and metric == 'gini' and measure == 'ppl_sparsity'").iloc[0]
    assert (pooled["models"], pooled["points"]) == (5, 10)
    assert not isinstance(foretelling(tables), NothingToShow)
    few = {"a": {}, "b": {}}
    make_results(tmp_path / "few", few, sites=("input",))
    assert isinstance(foretelling(make_tables(tmp_path / "few")), NothingToShow)
