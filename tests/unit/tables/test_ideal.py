"""Ideal speed-ups, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_results import WEIGHTS, make_results, make_tables, write_model
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.models.token_weights import weights_of_a_token
from sparsity_atlas.tables.ideal import Ideal


def curve(*points: tuple[float | None, float | None]) -> dict:
    rows = [{"task": "prose", "sparsity": of, "parameter_sparsity": by} for of, by in points]
    return {"weights": 50, "points": rows}


def test_half_of_half_of_the_weights() -> None:
    ideal = Ideal(curve((0.0, 0.0), (0.4, 0.5), (None, None)), 100)
    assert ideal.of(0.5) == pytest.approx(1 / 0.75)
    assert ideal.of(0.0) == 1
    assert ideal.of(None) is None


def test_between_the_points_on_straight_lines() -> None:
    # Handed over in the order of levels, which need not be that of sparsity.
    ideal = Ideal(curve((0.4, 0.5), (0.0, 0.0)), 100)
    assert ideal.at("prose", 0.2) == pytest.approx(1 / (1 - 0.25 * 0.5))
    assert ideal.at("prose", 0.4) == ideal.of(0.5)
    assert ideal.at("prose", None) is None
    assert ideal.at("another", 0.2) is None


def test_a_token_reads_the_layers_and_the_head_once(tmp_path: Path) -> None:
    """Tied or not: 64 entries by 1,000 words; of a mixture the experts that a token meets."""
    write_model(tmp_path / "dense", 10**6)
    write_model(tmp_path / "mixture", 10**6, active=10**5)
    found = [
        weights_of_a_token(read_manifest(tmp_path / one / "model.json"))
        for one in ("dense", "mixture")
    ]
    assert found == [10**6 + 64_000, 10**5 + 64_000]


def test_the_published_ceilings() -> None:
    """Of the FFN alone: 61 % of i is 1.26, 37 % of g 1.33, 48 % of x 1.47 times."""
    for share, sparsity, wanted in ((1 / 3, 0.61, 1.26), (2 / 3, 0.37, 1.33), (2 / 3, 0.48, 1.47)):
        one = Ideal({"weights": share, "points": []}, 1)
        assert one.of(sparsity) == pytest.approx(wanted, abs=0.006)


def test_the_tables_have_it_at_each_level_and_at_the_crossing(tmp_path: Path) -> None:
    tables = make_tables(make_results(tmp_path, {"small": {"parameters": 10**6}}))
    share = WEIGHTS / (10**6 + 64_000)
    curves = tables.curves
    found = 1 / (1 - curves["parameter_sparsity"] * share)
    assert curves["ideal_speedup"].tolist() == pytest.approx(found.tolist())
    assert curves.loc[curves["level"] == "dense", "ideal_speedup"].eq(1).all()
    # The fake curves' sparsity of parameters is that of entries.
    rows = tables.critical_sparsity[tables.critical_sparsity["relation"] == "="]
    assert len(rows) > 0
    wanted = 1 / (1 - rows["value"] * share)
    assert rows["ideal_speedup"].tolist() == pytest.approx(wanted.tolist())
