"""What a row says of times: by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsity_atlas.criteria import create
from sparsity_atlas.decoding.trial import Time
from sparsity_atlas.speed.speed_table import FIXED, FOUND
from sparsity_atlas.speed.text_vectors import Seen
from sparsity_atlas.speed.timed_rows import Dense, Point, pays_from
from sparsity_atlas.terms import PlaceKey

PLACE = PlaceKey(0, "ffn", "intermediate")


@pytest.mark.parametrize(
    ("speedups", "wanted"),
    [
        ((0.8, 0.9, 1.1), 0.15),
        ((1.1, 1.2, 1.3), 0.0),
        ((0.8, 0.9, 0.95), None),
        # A point that is faster by chance, and slower again behind it, does not pay.
        ((1.1, 0.9, 1.1), 0.15),
    ],
)
def test_from_where_on_it_pays(speedups: tuple[float, ...], wanted: float | None) -> None:
    found = pays_from(list(zip((0.0, 0.1, 0.2), speedups, strict=True)))
    assert found == (wanted if wanted is None else pytest.approx(wanted))


def row(threshold: str, sparsity: float, took: float, of: str = "") -> dict[str, Any]:
    """A third of what is read meets the entries."""
    times = {"sparse_us": took, "sparse_spread_us": 1.0}
    return {
        **{"threshold": threshold, "sparsity": sparsity, "unread_share": sparsity / 3},
        **{"of": of, **times},
    }


def test_dense_is_the_best_way_in_which_nothing_is_left_out() -> None:
    dense = Dense()
    dense.add("library", Time(100.0, 2.0))
    # At 0 % nothing is unread: our own product is a dense way, too. At 60 % a fifth is.
    timed = [row(FIXED, 0.6, 72.0, "prose PPL-1%"), row(FOUND, 0.6, 108.0), row(FIXED, 0.0, 90.0)]
    found = list(dense.finished(timed, 3000))
    assert [(one["threshold"], one["sparsity"]) for one in found] == [
        (FIXED, 0.0),
        (FIXED, 0.6),
        (FOUND, 0.6),
    ]
    assert {(one["dense_us"], one["dense_by"]) for one in found} == {(90.0, "own")}
    own = found[1]
    assert own["speedup"] == pytest.approx(90 / 72)
    assert own["ideal_speedup"] == pytest.approx(1 / 0.8)
    # A fifth of the time is gone, and a fifth of the bytes.
    assert own["realised_share"] == pytest.approx(1.0)
    assert own["bytes_read"] == 2400
    assert (own["pays_from"], found[2]["pays_from"]) == (0.0, None)
    # Nothing to realise at 0 %.
    assert found[0]["realised_share"] is None


def point(rule: str, level: float) -> tuple[Point, torch.Tensor]:
    values = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    bound = {PLACE: create({"rule": rule})}
    kept = bound[PLACE].mask(values, level)
    return Point(0.5, "", Seen(level, {PLACE: values}, {PLACE: kept}), bound), values


def test_constants_drop_as_much_as_the_criterion() -> None:
    own, values = point("topp", 0.8)
    found, fixed = own.ways
    assert (found.threshold, fixed.threshold) == (FOUND, FIXED)
    mask = fixed.bound[PLACE].mask(values, own.seen.level)
    assert float((~mask).float().mean()) == pytest.approx(
        own.seen.sparsity, abs=1.5 / values.numel()
    )
    # Of single tokens they drop other shares, and rows say what is left out by their own masks.
    assert torch.equal(fixed.seen.kept[PLACE], mask)
    assert found.seen is own.seen
    one = [torch.tensor([3])]
    assert fixed.seen.unread(PLACE, one) == pytest.approx(float((~mask[3]).float().mean()))
    assert fixed.seen.unread(PLACE, one) != found.seen.unread(PLACE, one)


def test_a_rule_of_constants_is_timed_once() -> None:
    own, _ = point("threshold", 0.3)
    (way,) = own.ways
    assert way == (FIXED, own.bound, own.seen)
