"""What is advised, of tables made up so that each rule shows."""

from __future__ import annotations

from dataclasses import replace
from html import unescape
from typing import Any

import pandas as pd
import pytest

from fake_results import make_results, make_tables
from fake_speed import speed_row
from sparsity_atlas.report import report
from sparsity_atlas.report.guidelines import Guideline, guidelines
from sparsity_atlas.speed.speed_table import FOUND, SPEED
from sparsity_atlas.tables.read import Tables

# Of what a token reads, what zeros at a site could spare.
WHOLE = {"intermediate": 0.2, "input": 0.4, "gate": 0.4}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Tables with every column."""
    models = {"small": {"parameters": 10**6}}
    return make_tables(make_results(tmp_path_factory.mktemp("results"), models, replicates=20))


def tables(some: Tables, *curves: dict[str, Any], sites: str = "input gate intermediate") -> Tables:
    """Of one model with these curves: criterion, site, value, and what else is not as usual."""
    rows, points = [], []
    for curve in curves:
        usual = {"criterion": "topp", "task": "prose", "kind": "loss", "relation": "="}
        usual |= {"resolved": True, "low_open": False, "high_open": False, "dense": 0.0}
        one = usual | {
            "interval_low": curve["value"] - 0.02,
            "interval_high": curve["value"] + 0.02,
        }
        one |= curve
        share = WHOLE[one["site"]]
        label = "PPL-1%" if one["kind"] == "loss" else "99%"
        one |= {"model": "small", "bar": 0.99, "bar_label": label}
        rows.append(one | {"ideal_speedup": 1 / (1 - share * one["value"])})
        for level, sparsity in (("dense", one["dense"]), ("0.9", 0.5), ("0.5", 0.9)):
            point = {name: one[name] for name in ("model", "criterion", "site", "task", "kind")}
            point |= {"level": level, "phase": "all", "sparsity": sparsity}
            point |= {"retained": 1.01 - sparsity / 50, "added_loss": sparsity / 50}
            for name in ("retained", "added_loss"):
                point |= {f"{name}_low": point[name] - 0.01, f"{name}_high": point[name] + 0.01}
            points.append(point | {"ideal_speedup": 1 / (1 - share * sparsity)})
    models = some.models.assign(sites=sites)
    return replace(
        some, critical_sparsity=pd.DataFrame(rows), curves=pd.DataFrame(points), models=models
    )


def said(found: list[Guideline], heading: str) -> list[tuple[str, tuple[str, ...]]]:
    """Texts and rows under a heading of the one model."""
    (one,) = found
    return [
        (advice.text, advice.rows)
        for name, advices in one.advices
        for advice in advices
        if name.startswith(heading)
    ]


def test_the_largest_ideal_speedup_is_recommended_and_not_the_largest_sparsity(
    some: Tables,
) -> None:
    found = guidelines(
        tables(some, {"site": "intermediate", "value": 0.6}, {"site": "input", "value": 0.4})
    )
    ((text, rows),) = said(found, "When nothing")
    # 1 / (1 - .4 · .4) = 1.19 against 1 / (1 - .2 · .6) = 1.14; ends at 38 and 42 %.
    assert text.startswith(
        "topp at input: PPL-1% sparsity 40.0 % (38 to 42), where the perplexity of prose"
    )
    assert "take 84% of its time, 1.19 times as fast (1.18 to 1.20)" in text
    assert "Not told apart" not in text
    assert rows == ("critical_sparsity.csv: small, topp, input, prose, PPL-1%",)


def test_curves_whose_intervals_overlap_are_named(some: Tables) -> None:
    found = guidelines(
        tables(
            some,
            {"site": "input", "value": 0.4},
            {"site": "input", "value": 0.37, "criterion": "topk"},
            {"site": "input", "value": 0.3, "criterion": "maxp"},
        )
    )
    ((text, rows),) = said(found, "When nothing")
    assert text.endswith("Not told apart from it: topk at input (1.17).")
    assert len(rows) == 2


def test_what_is_not_resolved_is_not_recommended_but_said(some: Tables) -> None:
    found = guidelines(
        tables(
            some,
            {"site": "input", "value": 0.8, "resolved": False},
            {"site": "intermediate", "value": 0.4},
        )
    )
    assert said(found, "When nothing")[0][0].startswith("topp at intermediate")
    ((text, rows),) = said(found, "What cannot")
    assert text == (
        "By prose, of topp at input: its interval is too wide, or it was drawn from too few samples."
    )
    assert rows == ("critical_sparsity.csv: small, topp, input, prose, PPL-1%",)


def test_accuracy_is_told_beside_the_loss(some: Tables) -> None:
    found = guidelines(
        tables(
            some,
            {"site": "input", "value": 0.4},
            {"site": "input", "value": 0.5, "task": "average", "kind": "accuracy"},
        )
    )
    texts = [text for text, _ in said(found, "When nothing")]
    assert "critical sparsity 50.0 %" in texts[1]
    assert "1 % of the accuracy over all tasks" in texts[1]
    # What each costs by the other one, at the mildest level that drops as much.
    assert texts[0].endswith(
        " At level 0.9, which drops 50.0%, 100.0% of the accuracy over all tasks is kept (99.0 to 101.0)."
    )
    assert texts[1].endswith(
        " At level 0.9, which drops 50.0%, the perplexity of prose changes by +1.0 % (+0.0 to +2.0)."
    )
    rows = [rows[-1] for _, rows in said(found, "When nothing")]
    assert rows == [f"curves.csv: small, topp, input, {task}, 0.9" for task in ("average", "prose")]


@pytest.mark.parametrize("relation", ["none", "="])
def test_an_accuracy_that_is_a_guess_says_nothing_of_a_loss(some: Tables, relation: str) -> None:
    average = {"task": "average", "kind": "accuracy", "relation": relation, "resolved": False}
    made = tables(
        some, {"site": "input", "value": 0.95}, {"site": "input", "value": 0.5, **average}
    )
    ((text, _),) = said(guidelines(made), "When nothing")
    assert ("of the accuracy over all tasks is kept" in text) == (relation == "=")
    # No level drops as much: the harshest one.
    assert ("At level 0.5, which drops 90.0%, 99.2% of" in text) == (relation == "=")
    (said_of, *_) = said(guidelines(made), "What cannot")
    assert said_of[0].startswith("By average accuracy, of topp at input: ")


def test_where_no_curve_can_be_named_that_is_said(some: Tables) -> None:
    made = tables(
        some,
        {"site": "input", "value": 0.8, "resolved": False},
        {"site": "intermediate", "value": 0.4, "relation": "<"},
    )
    ((text, rows),) = said(guidelines(made), "When nothing")
    assert text == "No curve can be named: of none is a sparsity known at which the bar is kept."
    both = [f"critical_sparsity.csv: small, topp, {site}, prose, PPL-1%" for site in WHOLE]
    assert set(rows) == set(both[:2])
    assert said(guidelines(made), "When a predictor") == []
    told = dict(said(guidelines(made), "What cannot"))
    text = (
        "What a predictor would add: at intermediate no sparsity is known at which the bar is kept."
    )
    assert told[text] == (both[0],)


def test_what_was_not_measured_at_intermediate_is_untold(some: Tables) -> None:
    told = dict(said(guidelines(tables(some, {"site": "input", "value": 0.4})), "What cannot"))
    assert told == {
        "What a predictor would add: no loss was measured at intermediate.": (
            "critical_sparsity.csv: small, no row of a loss at intermediate",
        ),
        "How much is zero by itself: nothing was measured at intermediate or gate.": (
            "curves.csv: small, no dense row of these sites",
        ),
    }
    everything = tables(some, {"site": "intermediate", "value": 0.4})
    assert said(guidelines(everything), "What cannot") == []


def test_what_a_probe_missed_is_said_where_one_was_tried(some: Tables) -> None:
    made = tables(some, {"site": "intermediate", "value": 0.6})
    ((text, rows),) = said(guidelines(made), "When a predictor")
    assert text.endswith(" What it gets wrong was not measured.")
    named = {"model": "small", "criterion": "topp", "site": "intermediate"}
    tried = [
        named | {"level": level, "quantity": f"{name}_by_probe", "at": rank, "value": value}
        for level, rank, name, value in (
            ("0.9", 4, "recall", 0.5),
            ("0.9", 64, "recall", 0.8),
            ("0.9", 64, "sparsity", 0.3),
            ("0.5", 64, "recall", 0.6),
        )
    ]
    masks = pd.DataFrame(tried).assign(low=0.7, high=0.9)
    ((text, more),) = said(guidelines(replace(made, masks=masks)), "When a predictor")
    # 50 % are nearer to 60 than 90 are.
    assert text.endswith(
        ", where without it are 1.14. On the captured text a least-squares probe of rank 64 named 80% of "
        "what is kept at level 0.9, which drops 50.0% (70% to 90% by layer)."
    )
    assert more == (
        *rows,
        "masks.csv: small, topp, intermediate, 0.9, recall_by_probe, 64",
    )


@pytest.mark.parametrize(("sites", "maps"), [("input gate intermediate", 3), ("intermediate", 2)])
def test_a_predictor_spares_the_factors_too(some: Tables, sites: str, maps: int) -> None:
    made = tables(some, {"site": "intermediate", "value": 0.5}, sites=sites)
    ((text, _),) = said(guidelines(made), "When a predictor")
    assert f"{1 / (1 - maps * 0.1):.2f} times as fast" in text
    assert "where without it are 1.11" in text


def test_zeros_that_are_there_already(some: Tables) -> None:
    for dense, words in (
        (0.9, "at no loss, they make it at most 1.22"),
        (0.001, "Next to nothing: 0.1%"),
        (0.08, "Little: 8.0% of"),
    ):
        made = tables(some, {"site": "intermediate", "value": 0.5, "dense": dense})
        ((text, rows),) = said(guidelines(made), "What is sparse")
        assert words in text
        assert rows == ("curves.csv: small, topp, intermediate, prose, dense",)


def test_zeros_of_the_gate_spare_the_other_factor_too(some: Tables) -> None:
    curves = ({"site": site, "value": 0.5, "dense": 0.9} for site in ("intermediate", "gate"))
    (_, (text, rows)) = said(guidelines(tables(some, *curves)), "What is sparse")
    assert text.startswith(
        "90.0% of the untouched model's gate entries are exact zeros: take gate and no"
    )
    assert "at most 1.56 times" in text
    assert rows == ("curves.csv: small, topp, gate, prose, dense",)


def test_a_level_that_is_below_the_bar_already_is_not_recommended(some: Tables) -> None:
    found = guidelines(
        tables(
            some,
            {"site": "input", "value": 0.8, "relation": "<"},
            {"site": "intermediate", "value": 0.7, "relation": ">=", "high_open": True},
        )
    )
    ((text, _),) = said(found, "When nothing")
    assert text.startswith("topp at intermediate: PPL-1% sparsity at least 70.0 % (68 to >72)")
    # 1 / (1 - .2 · .7), at 68 and 72 %.
    assert "1.16 times as fast (1.16 to >1.17)" in text
    ((text, _),) = said(found, "What cannot")
    assert (
        text == "By prose, of topp at input: the mildest level is below the bar already, or may be."
    )


def test_a_model_without_the_runs_first_loss_has_its_own(some: Tables) -> None:
    made = tables(
        some, {"site": "input", "value": 0.4}, {"site": "input", "value": 0.3, "task": "own"}
    )
    rows = made.critical_sparsity
    rows.loc[rows["task"] == "prose", "model"] = "another"
    assert made.loss_task() == "prose"
    ((text, _),) = said(guidelines(made), "When nothing")
    assert "PPL-1% sparsity 30.0 % (28 to 32), where the perplexity of own is 1 % higher" in text


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (
            {"kind": "diffusion"},
            "; its passes go over many tokens, which together leave less unread.",
        ),
        ({"active_parameters": 10**5}, "; tokens decoded together meet other experts"),
    ],
)
def test_batches_are_told_of_dense_causal_models_alone(
    some: Tables, described: dict[str, Any], words: str
) -> None:
    made = tables(some, {"site": "input", "value": 0.6})
    found = guidelines(replace(made, models=made.models.assign(**described)))
    ((text, _),) = said(found, "When nothing")
    assert words in text
    assert "nothing in common" not in text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.8, "9 together still gain 5%"),
        (0.98, "105 together still gain 5%"),
        (1.0, "any number of tokens together gains 5%"),
        (0.2, "two tokens with nothing in common gain less than 5%"),
        (0.1, "less than the 5% from which on it is worth anything"),
    ],
)
def test_a_batch_reads_what_any_of_its_tokens_wants(some: Tables, value: float, words: str) -> None:
    """.4 · s^B >= .0476 up to B = 9 where s is .8, 105 where it is .98, 1 where it is .2, never where .1."""
    ((text, _),) = said(guidelines(tables(some, {"site": "input", "value": value})), "When nothing")
    assert words in text


def test_what_is_recommended_and_was_not_timed_is_said(some: Tables) -> None:
    made = tables(some, {"site": "input", "value": 0.4}, {"site": "intermediate", "value": 0.4})
    for site, told in (
        ("intermediate", ["In time, of topp at input: it was not timed."]),
        ("input", []),
    ):
        key = {"model": "small", "criterion": "topp", "site": site}
        speed = pd.DataFrame([key | speed_row("ffn", 1, FOUND, 0.5)], columns=SPEED)
        texts = [text for text, _ in said(guidelines(replace(made, speed=speed)), "What cannot")]
        assert [text for text in texts if "not timed" in text] == told
    texts = [text for text, _ in said(guidelines(made), "What cannot")]
    assert [text for text in texts if "timed" in text] == []


def test_the_page_has_them(some: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "model_images", lambda tables, share: [])
    ((text, rows),) = said(guidelines(some), "What is sparse")
    page = unescape(report.build(some, [], "models: {}\n", None)).replace("\u00a0", " ")
    assert text in page
    assert f"[{rows[0]}]" in page
