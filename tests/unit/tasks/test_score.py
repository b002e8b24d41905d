"""Which metric makes a task's curve."""

from __future__ import annotations

from typing import Any

import pytest

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.tasks.score import choose_metric, pooled_score


def result(
    leaves: dict[str, list[str]], kinds: tuple[str, ...] = ("multiple_choice",), **grows: bool
) -> dict[str, Any]:
    """What eval.json says of a task; a metric grows with quality unless said otherwise."""
    scores = {leaf: dict.fromkeys(keys, 0.5) for leaf, keys in leaves.items()}
    return {
        "output_types": list(kinds),
        "leaves": list(leaves),
        "scores": {**scores, "whole group": {}},
        "higher_is_better": {
            leaf: {key.split(",")[0]: grows.get(key.split(",")[0], True) for key in keys}
            for leaf, keys in leaves.items()
        },
    }


ONE = result({"a": ["acc_norm,none", "acc,none", "acc_stderr,none", "f1,none"]})
FILTERED = result({"a": ["exact_match,strict", "exact_match,flexible"]})
ROLLING = result({"a": ["word_perplexity,none"]}, ("loglikelihood_rolling",), word_perplexity=False)
GROUP = result({"a": ["acc,none", "acc_norm,none"], "b": ["acc_norm,none", "exact_match,none"]})


@pytest.mark.parametrize(
    ("wanted", "of", "expected"),
    [
        (None, ONE, ("accuracy", "acc,none")),
        ("acc_norm", ONE, ("accuracy", "acc_norm,none")),
        ("acc_norm,none", ONE, ("accuracy", "acc_norm,none")),
        (None, FILTERED, ("accuracy", "exact_match,flexible")),
        ("exact_match,strict", FILTERED, ("accuracy", "exact_match,strict")),
        (None, ROLLING, ("loss", None)),
        ("word_perplexity", ROLLING, ("loss", None)),
        (None, result({"a": ["pass@1,create_test"]}), ("accuracy", "pass@1,create_test")),
        ("acc_norm", GROUP, ("accuracy", "acc_norm,none")),
    ],
)
def test_choice(wanted: str | None, of: dict, expected: tuple) -> None:
    assert choose_metric("t", wanted, of) == expected


@pytest.mark.parametrize(
    ("wanted", "of", "message"),
    [
        (
            "f2",
            ONE,
            r"tasks\.t: metric: no 'f2' among its metrics: acc,none, acc_norm,none, f1,none",
        ),
        ("acc,strict", ONE, "no 'acc,strict'"),
        # `acc` of one member of a group is no metric of the group.
        (None, GROUP, r"no 'acc' among its metrics: acc_norm,none$"),
        ("acc", ROLLING, "no 'acc' among its metrics: word_perplexity,none"),
        ("ter", result({"a": ["ter,none"]}, ter=False), "'ter' does not grow with quality"),
    ],
)
def test_refused(wanted: str | None, of: dict, message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        choose_metric("t", wanted, of)


def test_pooled() -> None:
    rows = [
        {"metrics": [("acc,none", 1.0)], "nats": 3.0, "predicted": 2},
        {"metrics": [("acc,none", 0.0)], "nats": 9.0, "predicted": 4},
    ]
    assert pooled_score("t", "accuracy", "acc,none", rows) == 0.5
    assert pooled_score("t", "loss", None, rows) == 2.0
    wild = [{**rows[0], "metrics": [("acc,none", float("nan"))]}, rows[1]]
    with pytest.raises(
        AtlasError, match=r"tasks\.t: metric: 'acc,none' is NaN or infinite in 1 of 2"
    ):
        pooled_score("t", "accuracy", "acc,none", wild)
    with pytest.raises(AtlasError, match=r"tasks\.t: metric: 'mcc,none' is no mean over samples"):
        pooled_score("t", "accuracy", "mcc,none", rows)
