"""What each document costs, as a batch's record has it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_atlas.lm.usage import packed, unpacked


@given(st.lists(st.integers(-(2**63) + 1, 2**63 - 1), max_size=8))
def test_integers_come_back_from_their_text(numbers: list[int]) -> None:
    found = unpacked(json.loads(json.dumps(packed(np.array(numbers, np.int64)))))
    assert found.dtype == np.int64
    assert found.tolist() == numbers


@pytest.mark.parametrize("largest", [2**31 - 1, 2**31])
def test_small_ones_take_half_the_text(largest: int) -> None:
    text = packed(np.array([[0, 7, largest], [1, 2, 3]]))
    assert unpacked(text).tolist() == [0, 7, largest, 1, 2, 3]
    assert len(text) == 1 + (32 if largest < 2**31 else 64)
