"""What measured times are said to come to, of tables made up so that each rule shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from fake_results import make_results, make_tables
from fake_speed import MACHINE, speed_row
from sparsity_atlas.report import report
from sparsity_atlas.report.guidelines import guidelines
from sparsity_atlas.report.measured_time import advices, own_points, own_zeros, untold
from sparsity_atlas.speed.speed_table import FIXED, FOUND, REFUSED, SPEED, TOKEN
from sparsity_atlas.tables.read import Tables

KEY = {"model": "small", "criterion": "topp", "site": "input"}
OF = "prose PPL-1%"


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Tables with every column, of a run in which nothing was timed."""
    models = {"small": {"parameters": 10**6}}
    return make_tables(make_results(tmp_path_factory.mktemp("results"), models, replicates=20))


def with_rows(
    some: Tables, *rows: dict[str, Any], relation: str = "=", resolved: bool = True
) -> Tables:
    """With a curve whose own point is `OF`."""
    named = KEY | {
        "task": "prose",
        "kind": "loss",
        "bar": 0.99,
        "bar_label": "PPL-1%",
        "value": 0.6,
    }
    named |= {"relation": relation, "resolved": resolved}
    crossing = some.critical_sparsity[:1].assign(**named)
    return replace(
        some,
        speed=pd.DataFrame([KEY | one for one in rows], columns=SPEED),
        critical_sparsity=crossing,
    )


def own(
    tokens: int, sparsity: float = 0.6, timed: str = TOKEN, **other: Any
) -> list[dict[str, Any]]:
    return [speed_row(timed, tokens, name, sparsity, OF, **other) for name in (FOUND, FIXED)]


def test_what_a_token_gains_and_at_which_batch_that_stops(some: Tables) -> None:
    (one,) = advices(with_rows(some, *own(1), *own(2), *own(4)), "small")
    # 100 over 70 and 80; of two 100 over 82, of four 100 over 93.5, and ten more to find thresholds.
    assert one.text == (
        "topp at input, where it crosses prose PPL-1% (60.0% of the entries dropped in a text of the run): "
        "on Some GPU in bfloat16 a token behind 512 others is 1.25 times as fast as dense with thresholds "
        "found at each token and 1.43 times as fast as dense with fixed thresholds; by bytes it would be "
        "1.43 times. Dense is caught up with from 20% on with thresholds found at each token, from 0% on "
        "with fixed thresholds. Of 1, 2, 4 tokens decoded together all gain 5% at the least. Copies of "
        "weights take 1.0 MiB."
    )
    assert one.rows == (
        "critical_sparsity.csv: small, topp, input, prose, PPL-1%",
        "speed.csv: small, topp, input, token, context 512, 1, 2, 4 together, found and fixed, prose PPL-1%",
    )
    (one,) = advices(with_rows(some, *own(1), *own(2), *own(8), *own(16)), "small")
    assert (
        "Of 1, 2, 8, 16 tokens decoded together 2 still gain 5%; with 8 it stops paying (1.01 times). "
        in one.text
    )


def test_a_small_gain_does_not_pay_and_one_within_the_spread_is_not_told(some: Tables) -> None:
    (one,) = advices(with_rows(some, *own(1, 0.05, spread=30.0)), "small")
    assert "not told from none by the spread of the times" in one.text
    assert "A gain of 5% is not reached at 1: it does not pay there. " in one.text
    # A gain that is large and not told is none to go by.
    (one,) = advices(with_rows(some, *own(1, 0.6, spread=40.0)), "small")
    assert "A gain of 5% is not reached at 1: it does not pay there. " in one.text
    (one,) = advices(with_rows(some, *own(1, 0.6)), "small")
    assert "not told" not in one.text
    assert "More than 1 together were not timed. " in one.text


def test_a_gain_counts_as_it_is_shown(some: Tables) -> None:
    (one,) = advices(with_rows(some, *own(1, 0.09)), "small")
    # 100 over 95.5.
    assert "1.05 times as fast as dense with fixed thresholds" in one.text
    assert "A gain of 5% is not reached" not in one.text
    (one,) = advices(with_rows(some, *own(1, 0.085)), "small")
    assert "1.04 times as fast as dense with fixed thresholds" in one.text
    assert "A gain of 5% is not reached at 1: it does not pay there. " in one.text


def test_what_never_pays_is_said(some: Tables) -> None:
    (one,) = advices(with_rows(some, *own(1, pays_from=None)), "small")
    assert (
        "at no sparsity with thresholds found at each token, at no sparsity with fixed" in one.text
    )


def test_a_curve_that_never_crosses_or_is_not_resolved_is_not_said_to_cross(some: Tables) -> None:
    (one,) = advices(with_rows(some, *own(1), relation=">="), "small")
    assert one.text.startswith(
        "topp at input, at the largest sparsity measured, where it does not yet cross prose PPL-1% (60.0%"
    )
    (one,) = advices(with_rows(some, *own(1), resolved=False), "small")
    assert (
        "crosses prose PPL-1%, as far as the data tell, which do not resolve it (60.0%" in one.text
    )


def test_times_of_shares_alone_are_told_to_be_that(some: Tables) -> None:
    tables = with_rows(some, speed_row(TOKEN, 1, FOUND, 0.5), relation="<")
    assert list(advices(tables, "small")) == []
    (one,) = untold(tables, "small")
    assert one.text == (
        "In time, of topp at input: no sparsity is known at which the bar is kept, so that only shares of "
        "the entries were timed."
    )
    assert one.rows == ("speed.csv: small, topp, input, token",)
    text = report.build(tables, [], "a: 1\n")
    assert "No time was measured in this run" not in text
    assert "no curve that was has a sparsity" in text


def test_a_curve_made_anew_since_it_was_timed_is_passed_over(some: Tables) -> None:
    tables = with_rows(some, *own(1))
    assert (
        list(advices(replace(tables, critical_sparsity=some.critical_sparsity[:0]), "small")) == []
    )


def test_maps_are_told_only_where_no_token_was_timed(some: Tables) -> None:
    maps = own(1, timed="ffn")
    assert len(list(advices(with_rows(some, *maps, *own(1)), "small"))) == 1
    refused = {**MACHINE, "timed": TOKEN, "status": REFUSED, "reason": "it has a norm"}
    tables = with_rows(some, *maps, refused)
    (one,) = advices(tables, "small")
    assert "its maps (ffn) are 1.25 times" in one.text
    assert "Copies" not in one.text
    (why,) = untold(tables, "small")
    assert why.text == "In time, of topp at input: whole tokens: it has a norm."
    assert why.rows == ("speed.csv: small, topp, input, token",)
    (found,) = guidelines(tables)
    headings = dict(found.advices)
    assert one in headings["What it buys in time"]
    assert why in headings["What cannot be told"]


def test_the_table_of_own_points(some: Tables) -> None:
    shares = [speed_row(TOKEN, 1, FOUND, 0.5)]
    (found, fixed) = own_points(with_rows(some, *shares, *own(1), *own(2)))
    assert found["timed"] == "token behind 512"
    assert (found["dense"], found["sparse"]) == ("100.0 ± 0.5", "80.0 ± 0.5")
    (slow, _) = own_points(with_rows(some, *own(1, sparse_us=30739.4, sparse_spread_us=1250.4)))
    assert slow["sparse"] == "30,739 ± 625.2"
    # Of 30 % that need not be read 20 are saved, or all.
    assert (found["realised"], fixed["realised"]) == ("0.67", "1.00")
    assert (found["pays"], fixed["pays"]) == ("20", "0")


def test_the_page_says_whether_times_were_measured(some: Tables) -> None:
    text = report.build(some, [], "a: 1\n")
    assert "No time was measured in this run" in text
    assert 'id="speed"' not in text
    text = report.build(with_rows(some, *own(1)), [], "a: 1\n")
    assert "No time was measured in this run" not in text
    assert 'id="speed"' in text
    assert "Machine: Some GPU, bfloat16." in text
    assert '<th scope="col">Machine</th>' not in text
    text = report.build(with_rows(some, *own(1), *own(1, device="Another")), [], "a: 1\n")
    assert "Machine: " not in text
    assert '<th scope="col">Machine</th>' in text
    assert '<td class="name">Another, bfloat16</td>' in text


@pytest.mark.parametrize("timed", [TOKEN, "ffn"])
def test_a_models_own_zeros_are_spoken_of_by_themselves(some: Tables, timed: str) -> None:
    none = {"wanted": 0.0}
    rows = [
        speed_row(timed, count, threshold, 0.9, **none)
        for count in (1, 16)
        for threshold in (FOUND, FIXED)
    ]
    rows += [row | {"criterion": "topk", "speedup": 9.0} for row in rows]
    made = replace(some, speed=pd.DataFrame([KEY | one for one in rows], columns=SPEED))
    (one,) = own_zeros(made, "small")
    # 100 over 55, and of sixteen over 90.7.
    what = "a token behind 512 others is" if timed == TOKEN else "its maps (ffn) are"
    assert one.text == (
        "Its own zeros at input, 90.0% of the entries in a text of the run, left out and nothing else: on "
        f"Some GPU in bfloat16 {what} 1.82 times as fast as dense with fixed thresholds; by bytes it would "
        "be 1.82 times. Of 1, 16 tokens decoded together all gain 5% at the least."
    )
    context = ", context 512" if timed == TOKEN else ""
    assert one.rows == (
        f"speed.csv: small, topp, input, {timed}{context}, 1, 16 together, fixed, 0% wanted",
    )
    (found,) = guidelines(made)
    assert one in dict(found.advices)["What it buys in time"]
    # Few of them, or a share that a criterion drops, are none.
    for other in ({"sparsity": 0.09}, {"wanted": 0.9}, {"of": OF}, {"status": REFUSED}):
        made = replace(some, speed=made.speed.assign(**other))
        assert list(own_zeros(made, "small")) == []
