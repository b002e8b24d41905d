"""The criteria against hand-computed cases and against their definition, summed exactly."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drawn_rows import LEVEL, TYPES, rows, smallest_supports
from sparsity_atlas.criteria import check_level, create, level_range, source_file
from sparsity_atlas.errors import AtlasError


def kept(rule: dict, values: list[float], level: float) -> list[int]:
    mask = create(rule).mask(torch.tensor([values], dtype=torch.float32), level)
    assert mask.dtype == torch.bool
    assert mask.shape == (1, len(values))
    return mask[0].nonzero().flatten().tolist()


TOPP = {"rule": "topp"}
TOPK = {"rule": "topk"}
MAXP = {"rule": "maxp"}


@pytest.mark.parametrize(
    ("rule", "values", "level", "expected"),
    [
        # Running sums 4, 7, 9, 10 of Σ|v| = 10: the entry that reaches p is kept.
        (TOPP, [1, -2, 3, -4], 0.4, [3]),
        (TOPP, [1, -2, 3, -4], 0.41, [2, 3]),
        (TOPP, [1, -2, 3, -4], 0.7, [2, 3]),
        (TOPP, [1, -2, 3, -4], 0.71, [1, 2, 3]),
        (TOPP, [1, -2, 3, -4], 0.95, [0, 1, 2, 3]),
        # Squares 16, 25, 29, 30 of 30: 0.8 lies below 25/30 and above 16/30.
        (TOPP | {"power": 2}, [1, -2, 3, -4], 0.53, [3]),
        (TOPP | {"power": 2}, [1, -2, 3, -4], 0.8, [2, 3]),
        (TOPP | {"power": 2}, [1, -2, 3, -4], 0.84, [1, 2, 3]),
        # Cubes 64, 91, 99, 100 of 100.
        (TOPP | {"power": 3}, [1, -2, 3, -4], 0.63, [3]),
        (TOPP | {"power": 3}, [1, -2, 3, -4], 0.90, [2, 3]),
        (TOPP | {"power": 3}, [1, -2, 3, -4], 0.92, [1, 2, 3]),
        # Ties with the crossing entry stay.
        (TOPP, [2, 2, 1, -2], 0.1, [0, 1, 3]),
        (TOPP, [5, 0, 0, 5], 0, [0, 3]),
        (TOPP, [5, 0, 1, 0], 1, [0, 1, 2, 3]),
        (TOPP, [5, 0, 1, 0], 0.99, [0, 2]),
        (TOPP, [0, 0, 0], 0.5, [0, 1, 2]),
        (TOPP, [0, 0, 0], 0, [0, 1, 2]),
        (TOPP, [-3], 0, [0]),
        # k = floor(level · width)
        (TOPK, [1, -5, 3, 2], 0.5, [1, 2]),
        (TOPK, [1, -5, 3, 2], 0.74, [1, 2]),
        (TOPK, [1, -5, 3, 2], 0.75, [1, 2, 3]),
        (TOPK, [1, -5, 3, 2], 0.24, []),
        (TOPK, [1, -5, 3, 2], 0, []),
        (TOPK, [1, 0, 3, 2], 1, [0, 1, 2, 3]),
        (TOPK, [3, -3, 3, 1], 0.25, [0, 1, 2]),
        (TOPK, [0, 0, 0, 0], 0.5, [0, 1, 2, 3]),
        (TOPK, [7], 0.99, []),
        (TOPK, [7], 1, [0]),
        # |v| ≥ level · 4
        (MAXP, [1, -2, 3, -4], 0.5, [1, 2, 3]),
        (MAXP, [1, -2, 3, -4], 0.51, [2, 3]),
        (MAXP, [1, -2, 4, -4], 1, [2, 3]),
        (MAXP, [1, 0, 4, -4], 0, [0, 1, 2, 3]),
        (MAXP, [0, 0], 0.7, [0, 1]),
    ],
)
def test_hand_computed(rule: dict, values: list[float], level: float, expected: list[int]) -> None:
    assert kept(rule, values, level) == expected


def test_topk_takes_the_decimal_that_was_written() -> None:
    # 0.29 · 100 is 28.999999999999996 in floating point.
    assert len(kept(TOPK, list(range(1, 101)), 0.29)) == 29


@pytest.mark.parametrize("dtype", TYPES)
def test_maxp_does_not_round_its_threshold(dtype: torch.dtype) -> None:
    # The entry is the level as the type can hold it: a little above or a little below.
    sides = set()
    for level in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        values = torch.tensor([[1.0, level]], dtype=dtype)
        sides.add(float(values[0, 1]) >= level)
        assert create(MAXP).mask(values, level)[0, 1] == (float(values[0, 1]) >= level)
    assert sides == {True, False}


def test_topp_sums_in_double_precision() -> None:
    # 2^24 + 1 is 2^24 in float32: a running sum there would never see the tail.
    values = [2.0**24] + [1.0] * 2**12
    # The large entry and 2048 of the tail hold the share; all the tail ties.
    level = (2**24 + 2**11) / (2**24 + 2**12)
    assert len(kept(TOPP, values, level)) == 1 + 2**12
    assert len(kept(TOPP, values, 2**24 / (2**24 + 2**12))) == 1


@settings(max_examples=150, deadline=None)
@given(rows(), LEVEL, st.sampled_from((1, 2, 3)))
def test_topp_is_the_smallest_support(values: Tensor, level: float, power: int) -> None:
    mask = create({"rule": "topp", "power": power}).mask(values, level)
    for row, keep in zip(values, mask, strict=True):
        assert keep.tolist() in smallest_supports(row, level, power)


@settings(max_examples=100, deadline=None)
@given(rows(), LEVEL)
def test_topk_keeps_k_and_ties(values: Tensor, level: float) -> None:
    mask = create(TOPK).mask(values, level)
    count = math.floor(Fraction(str(level)) * values.shape[1])
    for row, keep in zip(values, mask, strict=True):
        ordered = sorted(row.abs().tolist(), reverse=True)
        wanted = [count > 0 and value >= ordered[count - 1] for value in row.abs().tolist()]
        assert keep.tolist() == wanted


@settings(max_examples=100, deadline=None)
@given(rows(), LEVEL)
def test_maxp_compares_without_rounding(values: Tensor, level: float) -> None:
    mask = create(MAXP).mask(values, level)
    for row, keep in zip(values, mask, strict=True):
        magnitudes = [Fraction(value) for value in row.abs().double().tolist()]
        # float64 rounds the product; beyond its last bit there is nothing to compare.
        exact = Fraction(level) * max(magnitudes)
        wanted = [
            [value >= exact * (1 + side * Fraction(1, 2**52)) for value in magnitudes]
            for side in (-1, 0, 1)
        ]
        assert keep.tolist() in wanted


@settings(max_examples=60, deadline=None)
@given(rows(), LEVEL, st.sampled_from(("topp", "topk", "maxp")), st.randoms(use_true_random=False))
def test_rows_do_not_see_each_other(values: Tensor, level: float, rule: str, draw) -> None:
    criterion = create({"rule": rule})
    order = list(range(len(values)))
    draw.shuffle(order)
    together = criterion.mask(torch.cat([values[order], values * 3]), level)[: len(order)]
    alone = torch.cat([criterion.mask(values[i : i + 1], level) for i in order])
    assert torch.equal(together, alone)


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from(("topp", "topk", "maxp")), st.data())
def test_sparsity_grows_away_from_the_dense_level(
    values: Tensor, rule: str, data: st.DataObject
) -> None:
    criterion = create({"rule": rule})
    assert criterion.mask(values, criterion.dense_level).all()
    mild, harsh = sorted(
        (data.draw(LEVEL), data.draw(LEVEL)), key=lambda one: abs(one - criterion.dense_level)
    )
    assert not (criterion.mask(values, harsh) & ~criterion.mask(values, mild)).any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", ["topp", "topk", "maxp"])
def test_values_are_not_changed(rule: str, dtype: torch.dtype) -> None:
    values = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    create({"rule": rule}).mask(values, 0.5)
    assert torch.equal(values, before)


# Configuration


@pytest.mark.parametrize("power", [0, 0.5, -1, math.nan, math.inf, "two", True, None])
def test_bad_power(power: object) -> None:
    with pytest.raises(AtlasError, match="topp: power: expected a number of at least 1, found"):
        create({"rule": "topp", "power": power})


def test_unknown_rule_and_parameter() -> None:
    with pytest.raises(AtlasError, match=r"unknown rule 'topq'; built in: .*maxp, .*topk, topp"):
        create({"rule": "topq"})
    with pytest.raises(AtlasError, match=r"topp: .*powr"):
        create({"rule": "topp", "powr": 2})


@pytest.mark.parametrize("level", ["-0.01", "1.01", "2"])
def test_level_out_of_range(level: str) -> None:
    with pytest.raises(AtlasError, match=rf"levels: {level} is out of range for TopK \(0 to 1\)"):
        check_level(create(TOPK), level)


OWN = '''
from sparsity_atlas.criteria import Criterion


class Above(Criterion):
    """Keep what is at least `level` in magnitude."""

    lowest = -1
    highest = 8.0
    dense_level = -1
    coarse_levels = ("0.1", "0.5")

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def mask(self, values, level):
        return values.abs() * self.scale >= level
'''


def own(folder: Path, text: str, **parameters: object) -> dict:
    path = folder / "mine.py"
    path.write_text(text)
    return {"file": str(path), **parameters}


def test_own_criterion(tmp_path: Path) -> None:
    spec = own(tmp_path, OWN, scale=2.0)
    assert source_file(spec) == tmp_path / "mine.py"
    assert level_range(spec) == (-1, 8)
    assert kept(spec, [1, -2, 3], 4) == [1, 2]
    assert check_level(create(spec), "-1") == -1


def test_own_criterion_may_derive_from_a_built_in_one(tmp_path: Path) -> None:
    text = "from sparsity_atlas.criteria.built_in.topk import TopK\n\n\nclass Mine(TopK):\n"
    text += "    highest = 0.5\n    dense_level = 0.5\n    coarse_levels = ('0.4',)\n"
    spec = own(tmp_path, text)
    assert level_range(spec) == (0, 0.5)
    assert kept(spec, [1, -2, 3, 4], 0.5) == [2, 3]


def test_a_constant_that_is_only_inherited(tmp_path: Path) -> None:
    text = "from sparsity_atlas.criteria.built_in.threshold import GlobalThreshold\n\n\n"
    text += "class Mine(GlobalThreshold):\n    lowest = 0.0\n"
    with pytest.raises(AtlasError, match=r"mine\.py: Mine: highest is 1000\.0 by inheritance"):
        create(own(tmp_path, text))


def test_bounds_may_be_annotated(tmp_path: Path) -> None:
    spec = own(tmp_path, OWN.replace("highest =", "highest: float ="))
    assert level_range(spec) == (-1, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mask(:\n", r"mine\.py: line 1: "),
        ("import nowhere_to_be_found\n", r"mine\.py: .*nowhere_to_be_found"),
        ("answer = 42\n", r"mine\.py: expected one subclass of Criterion, found 0"),
        (OWN + OWN.split("Criterion\n", 1)[1].replace("Above", "Other"), "found 2"),
        (OWN.replace("def mask", "def musk"), r"mine\.py: .*mask"),
        (OWN.replace("    dense_level = -1\n", ""), r"mine\.py: Above: dense_level"),
        (
            OWN.replace("    lowest = -1\n", '    sites = ("middle",)\n'),
            "sites: expected a tuple of ",
        ),
        (OWN.replace("    lowest = -1\n", "    calibrated = 1\n"), "calibrated: expected True or"),
        (OWN.replace("dense_level = -1", "dense_level = 9"), r"mine\.py: Above: dense_level"),
        (OWN.replace("dense_level = -1", "dense_level = 3"), r"mine\.py: Above: dense_level"),
        (OWN.replace('    coarse_levels = ("0.1", "0.5")\n', ""), r"Above: coarse_levels"),
        (OWN.replace('("0.1", "0.5")', "(0.1, 0.50)"), r"mine\.py: Above: coarse_levels"),
        (OWN.replace('("0.1", "0.5")', '("0.1", "9")'), r"mine\.py: Above: coarse_levels"),
        (OWN.replace('("0.1", "0.5")', '("0.10", "0.5")'), r"mine\.py: Above: coarse_levels"),
    ],
)
def test_own_criterion_that_is_malformed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AtlasError, match=message) as caught:
        create(own(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_own_criterion_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"criteria: .*none\.py: no such file"):
        create({"file": str(tmp_path / "none.py")})
