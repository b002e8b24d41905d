"""Rows of a mixture's layers, whose parts have errors and targets of their own."""

from __future__ import annotations

from typing import Any

from sparsity_atlas.tables.layer_table import error_rows, layer_rows

KEY = {"model": "m", "criterion": "teal", "site": "intermediate"}


def asked(part: str, reached: float) -> dict[str, Any]:
    return {
        **{"tensor": "intermediate", "part": part, "of": "sparsity"},
        **{"target": 0.5, "reached": reached},
    }


def layer(number: int, **errors: float) -> dict[str, Any]:
    """Parts, of which each has as much sparsity as error."""
    parts = [{"part": name, "sparsity": one, "error": one} for name, one in errors.items()]
    mean = sum(errors.values()) / len(errors)
    targets = [asked(name, one) for name, one in errors.items()]
    return {
        **{"level": "0.5", "layer": number, "sparsity": mean, "error": mean},
        **{"targets": targets, "parts": parts},
    }


CAPTURED = [layer(0, ffn=0.5), layer(1, shared=0.125, experts=0.375)]


def test_errors_of_layers_and_of_parts() -> None:
    rows = list(error_rows(KEY, CAPTURED))
    found = {
        row["part"]: [row[name] for name in ("sparsity", "error", "error_low", "error_high")]
        for row in rows
    }
    assert found == {
        None: [0.375, 0.375, 0.25, 0.5],
        "ffn": [0.5] * 4,
        "shared": [0.125] * 4,
        "experts": [0.375] * 4,
    }
    assert all(row.items() >= KEY.items() for row in rows)


def test_of_several_parts_the_farthest_from_its_target_is_told() -> None:
    curve = {"layers": {"0.5": {"intermediate": [0.5, 0.25]}}, "phases": {}}
    rows = list(layer_rows(KEY, curve, CAPTURED))
    assert [row["reached"] for row in rows] == [0.5, 0.125]
    assert [row["target"] for row in rows] == [0.5, 0.5]
