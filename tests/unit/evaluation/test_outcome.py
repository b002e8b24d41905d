"""Induced sparsity as a node states it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sparsity_atlas.evaluation.outcome import sparsity
from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.terms import ACCOUNTS, PlaceKey


def test_a_layer_is_stated_once_with_all_of_its_parts() -> None:
    """Of a shared expert and routed ones: a share of the entries of both; products stay those of each."""
    slots = [
        Slot(PlaceKey(0, "ffn", "intermediate"), 10, 4),
        Slot(PlaceKey(1, "shared", "intermediate"), 6, 4),
        Slot(PlaceKey(1, "experts", "intermediate"), 30, 4),
        Slot(PlaceKey(1, "experts", "input"), 4, 60),
    ]
    zeros = np.array([[5, 3, 24, 2], [4, 6, 6, 0]])
    usage = SimpleNamespace(
        zeros=dict.fromkeys(ACCOUNTS, 0 * zeros) | {"scoring": zeros, "unique": zeros},
        tokens=dict.fromkeys(ACCOUNTS, np.zeros(2))
        | {"scoring": np.array([1, 2]), "unique": np.array([1, 2])},
    )
    found = sparsity([usage], slots)
    assert list(found) == ["intermediate", "input"]
    assert found["intermediate"]["layers"] == pytest.approx([9 / 30, 39 / 108])
    assert found["intermediate"]["total"] == pytest.approx(48 / 138)
    assert found["intermediate"]["outputs"] == [4, 4, 4]
    # By the layer's number: the first one has no such slot.
    assert found["input"]["layers"] == [None, pytest.approx(2 / 12)]
    assert (found["input"]["zero_products"], found["input"]["products"]) == (2 * 60, 3 * 4 * 60)
