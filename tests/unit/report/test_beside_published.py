"""Ours beside published numbers: which curve is taken, what is read of it, and where nothing is said."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.report.beside_published import COLUMNS, follows, published_scores, rows, shown
from sparsity_atlas.report.published_scores import SCORES
from sparsity_atlas.tables.read import Tables
from sparsity_atlas.terms import SITES

CONFIG = {"criteria": {"cats": {}, "teal": {"allocation": "greedy"}}}
QWEN, MISTRAL = "Qwen/Qwen2.5-3B", "mistralai/Mistral-7B-v0.1"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("beside")
    models = {
        "mistral": {"source": {"hub": MISTRAL}},
        "qwen": {"source": {"hub": QWEN}},
        "own": {"source": {"path": "own"}},
    }
    make_results(folder, models, criteria=("cats", "topk"), sites=("gate", "intermediate"))
    return make_tables(folder)


def of(found: list[dict], model: str, **about: object) -> list[dict]:
    return [
        row
        for row in found
        if row.get("model") == model and all(row[name] == value for name, value in about.items())
    ]


def test_accuracy_and_perplexity_are_read_between_the_levels(tables: Tables) -> None:
    found = list(rows(tables, CONFIG))
    (cats,) = of(found, "mistral", quantity="accuracy")
    curve = tables.curves.query(
        "model == 'mistral' and criterion == 'cats' and site == 'gate' and task == 'average'"
    ).sort_values("sparsity")
    assert cats["published_change"] == pytest.approx(100 * 68.90 / 69.94)
    expected = float(np.interp(0.5, curve["sparsity"], curve["value"]))
    assert cats["ours"] == pytest.approx(100 * expected)
    assert cats["change"] == pytest.approx(100 * cats["ours"] / cats["dense"])
    loss = tables.curves.query(
        "model == 'qwen' and criterion == 'topk' and site == 'intermediate' and task == 'prose'"
    ).sort_values("sparsity")
    at = {row["at"]: row for row in of(found, "qwen", quantity="perplexity")}
    # The harshest of the levels has a sparsity of 0.71.
    assert set(at) == {0.5, 0.6, 0.7}
    expected = float(np.interp(0.6, loss["sparsity"], loss["value"]))
    assert at[0.6]["ours"] == pytest.approx(math.exp(expected))
    assert at[0.6]["published_change"] == pytest.approx(7.2)
    dense = float(loss.query("level == 'dense'")["value"].iloc[0])
    assert at[0.6]["change"] == pytest.approx(100 * (math.exp(expected - dense) - 1))


def test_every_published_number_has_a_row_also_without_ours(tables: Tables) -> None:
    found = list(rows(tables, CONFIG))
    assert len(found) >= len(published_scores()) > len(SCORES)
    assert not of(found, "own")
    assert all(set(row) == set(COLUMNS) for row in found)
    texts = list(shown(tables, CONFIG))
    assert {row["model"] for row in texts} == {"mistral", "qwen"}
    assert "69.94 → 68.90 (98.5 %)" in {row["published"] for row in texts}


def test_exact_zeros_are_the_mean_over_the_layers(tables: Tables) -> None:
    models = tables.models.assign(source="SparseLLM/prosparse-llama-2-7b").query("model == 'own'")
    measured = tables.metrics.query("model == 'own' and tensor == 'intermediate'")
    measured = measured.assign(exact_zero=[0.9, 0.8, 0.7])
    found = list(rows(replace(tables, models=models, metrics=measured), CONFIG))
    (row,) = of(found, "own", quantity="zeros", at=None)
    assert row["ours"] == pytest.approx(80)
    assert row["published"] == 89.32


@pytest.mark.parametrize(
    ("entry", "same"),
    [
        ({}, True),
        ({"rule": "teal"}, False),
        ({"allocation": "greedy"}, False),
        ({"file": "mine.py"}, False),
        ({"power": 2}, False),
        ({"power": 1}, True),
    ],
)
def test_a_rule_with_other_parameters_is_another(entry: dict, same: bool) -> None:
    assert follows("topp", "topp", {"criteria": {"topp": entry}}) == same


def test_published_numbers_are_of_our_sites_and_rules_and_say_where_from() -> None:
    from sparsity_atlas.criteria import rule_names

    for score in SCORES:
        assert score.site in SITES
        assert score.rule in ("", *rule_names())
        assert score.source
        assert score.at is None or 0 < score.at < 1
    assert len({replace(score, source="", setting="") for score in SCORES}) == len(SCORES)


def test_what_sparsing_law_prints_of_a_model_and_of_its_training(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("trained")
    hub = "SparseLLM/sparsing-law-0.4b-silu"
    large = {"source": {"hub": "SparseLLM/sparsing-law-2.4b-relu"}, "tolerance": 0.6}
    models = {
        f"law-{n}": {"source": {"hub": hub}, "tolerance": 0.45 + 0.15 / n**1.5} for n in range(1, 7)
    }
    make_results(folder, {**models, "large": large}, criteria=["cett"], sites=["intermediate"])
    about = {name: Checkpoint("law", name, 1e9 * int(name[-1])) for name in models}
    tables = make_tables(folder, checkpoints=about)
    fits = tables.training_fits.query("law == 'power' and bar == 0.99 and task == 'prose'").iloc[0]
    told = tables.training_fits.assign(resolved=True)
    found = list(rows(replace(tables, training_fits=told), {"criteria": {"cett": {}}}))
    assert not of(found, "law-5", quantity="limit")
    (limit,) = of(found, "law-6", quantity="limit")
    assert (limit["published"], limit["source_model"]) == (pytest.approx(38.5), hub)
    assert limit["ours"] == pytest.approx(100 * fits["limit"])
    assert limit["ours_low"] <= limit["ours"] <= limit["ours_high"]
    untold = tables.training_fits.assign(resolved=False)
    kept = rows(replace(tables, training_fits=untold), {"criteria": {"cett": {}}})
    assert not of(list(kept), "law-6", quantity="limit")
    (ppl,) = of(found, "large", quantity="ppl_sparsity")
    own = tables.critical_sparsity.query("model == 'large' and task == 'prose' and bar == 0.99")
    assert ppl["published"] == 93.52
    assert ppl["ours"] == pytest.approx(100 * own["value"].iloc[0])
    assert ppl["dense"] == pytest.approx(math.exp(own["dense_value"].iloc[0]))
