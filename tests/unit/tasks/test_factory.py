"""Rows that are read many at a time are those that `datasets` gives one by one."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, Value

from sparsity_atlas.tasks import factory
from sparsity_atlas.tasks.factory import read_together, rows_of

COUNT = 25
FEATURES = Features(
    {
        "text": Value("string"),
        "number": Value("int32"),
        "share": Value("float32"),
        "when": Value("timestamp[s]"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "choices": datasets.Sequence({"text": Value("string"), "key": Value("string")}),
        "deep": [{"a": [Value("int64")], "b": {"c": Value("bool")}}],
        "square": datasets.Array2D((2, 2), "int64"),
        "raw": Value("binary"),
    }
)


def data() -> Dataset:
    """One of each kind of column, with gaps."""
    return Dataset.from_list(
        [
            {
                "text": f"text {i}" if i % 7 else None,
                "number": i,
                "share": i / 3,
                "when": datetime.datetime(2026, 1, 1 + i % 28),
                "label": i % 2,
                "choices": {"text": [f"{i} {j}" for j in range(i % 3)], "key": [*"ab"][: i % 3]},
                "deep": [{"a": [*range(i % 4)], "b": {"c": None if i % 5 else True}}],
                "square": [[i, 1], [2, 3]],
                "raw": bytes([i]),
            }
            for i in range(COUNT)
        ],
        features=FEATURES,
    )


ORDERS: dict[str, Callable[[Dataset], Dataset]] = {
    "as it is": lambda one: one,
    "shuffled": lambda one: one.shuffle(seed=3),
    "selected": lambda one: one.select([4, 4, 1, 20]),
    "a part": lambda one: one.select(range(5, 17)),
    "two joined": lambda one: datasets.concatenate_datasets([one, one.select([3, 1])]),
    "one column": lambda one: one.select_columns(["deep"]),
    "none": lambda one: one.select([]),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_same_rows(
    order: Callable[[Dataset], Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "TOGETHER", 4)
    own = order(data())
    expected = list(own)
    found = rows_of(own)
    assert found is not None
    listed = list(found)
    assert repr(listed) == repr(expected)
    assert [list(row) for row in listed] == [list(row) for row in expected]
    with read_together():
        assert repr(list(own)) == repr(expected)
    assert repr(list(own)) == repr(expected)


def test_each_time_other_objects() -> None:
    """Code of a task may change a document that it is given."""
    own = data()
    with read_together():
        (first, *_), (second, *_) = list(own), list(own)
    first["choices"]["text"].append("more")
    assert json.dumps(second["choices"]) != json.dumps(first["choices"])


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.with_format("numpy"),
        lambda one: one.with_format(columns=["text"]),
        lambda one: one.with_transform(lambda batch: {"text": batch["text"]}),
        lambda one: one.select_columns(["raw"]).cast_column("raw", datasets.Image()),
    ],
    ids=["another format", "some columns", "a transform", "columns that are decoded"],
)
def test_what_is_more_than_reading_is_left_to_it(change: Callable[[Dataset], Dataset]) -> None:
    own: Any = change(data())
    assert rows_of(own) is None


def test_it_ends_with_the_block() -> None:
    before = Dataset.__iter__
    with read_together():
        assert Dataset.__iter__ is not before
    assert Dataset.__iter__ is before
