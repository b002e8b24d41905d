"""Vectors and levels that Hypothesis draws for the tests of the criteria."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where rounding of a float64 sum may decide: a definition without rounding cannot say more.
SLACK = Fraction(1, 10**12)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHAPES = {
    "spread": lambda number: number,
    "tied": lambda number: float(round(number % 4)) if math.isfinite(number) else 0.0,
    "heavy": lambda number: math.copysign(min(math.exp(min(abs(number), 80)), 3e38), number),
}


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """[rows, width] with magnitudes of every kind: denormal, huge, tied, zero."""
    dtype = draw(st.sampled_from(TYPES))
    width = draw(st.sampled_from((1, 2, 3, 7, 16, 33)))
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    number = st.one_of(FINITE, st.just(0.0), st.floats(-4, 4, width=32))
    values = draw(st.lists(st.lists(number.map(shape), min_size=width, max_size=width), max_size=3))
    values.append([draw(number)] * width)
    largest = 6e4 if dtype == torch.float16 else 3e38
    return torch.tensor(values, dtype=torch.float64).clamp(-largest, largest).to(dtype)


LEVEL = st.one_of(
    st.sampled_from((0.0, 0.01, 0.29, 0.5, 0.9, 0.99, 0.999, 1.0)),
    st.integers(0, 1000).map(lambda number: number / 1000),
)


def smallest_supports(row: Tensor, level: float, power: int = 1) -> list[list[bool]]:
    """What top-p may keep of a row, by exact sums: the largest entries that hold the share, and ties.

    More than one answer where the sum, off by `SLACK`, lies on either side of the level.
    """
    if level == 1 or not row.any():
        return [[True] * len(row)]
    magnitudes = [Fraction(float(value.abs())) for value in row]
    total = sum(value**power for value in magnitudes)

    def threshold(target: Fraction) -> Fraction:
        running = Fraction(0)
        for value in sorted(magnitudes, reverse=True):
            running += value**power
            if running >= target * total:
                return value
        raise AssertionError("a share above 1")

    targets = max(Fraction(level) - SLACK, Fraction(0)), min(Fraction(level) + SLACK, Fraction(1))
    return [[value >= least for value in magnitudes] for least in map(threshold, targets)]
