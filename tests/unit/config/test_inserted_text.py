"""Tasks with a text before the prompts of another one: what they are, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.errors import AtlasError

PUT = {"before": "cloze", "text": "/ ", "times": 40}
CLOZE = {"include": "tasks", "limit": 24, "metric": "acc", "cluster": "template"}


def config(**tasks: Any) -> Config:
    return parse(
        {
            "models": {"m": {"path": "m"}},
            "criteria": {"topp": {}},
            "texts": {"prose": {"file": "prose.jsonl"}},
            "tasks": {"cloze": CLOZE, **tasks},
            "run": [{"models": ["m"]}],
        }
    )


def test_all_else_is_that_of_the_task_that_is_named() -> None:
    found = config(slashes={"inserted": PUT})
    entry = found.tasks["slashes"]
    assert entry.task == "cloze"
    assert entry.inserted is not None
    assert (entry.inserted.text, entry.inserted.times) == ("/ ", 40)
    same = entry.model_copy(update={"inserted": None, "task": None})
    assert same == found.tasks["cloze"]
    # As it is written down with the results, and read again.
    assert parse(found.model_dump(mode="json", exclude_none=True)) == found


def test_it_goes_into_what_an_evaluation_depends_on() -> None:
    found = config(slashes={"inserted": PUT}, more={"inserted": {**PUT, "times": 41}})
    tasks = json.loads(grid.evaluation_slice(found, "m", ("cloze", "slashes", "more")))["tasks"]
    assert "inserted" not in tasks["cloze"]
    assert tasks["slashes"]["inserted"] != tasks["more"]["inserted"]
    read = json.loads(grid.curve_slice(found, ("cloze", "slashes")))["tasks"]
    assert read == {"cloze": {"metric": "acc"}, "slashes": {"metric": "acc", "before": "cloze"}}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": {"inserted": {**PUT, "before": "close"}}}, "before: unknown 'close'; known: cloze"),
        ({"a": {"inserted": PUT, "limit": 3}}, "tasks.a: limit: what is not `inserted` is that of"),
        (
            {"a": {"inserted": PUT}, "b": {"inserted": {**PUT, "before": "a"}}},
            "tasks.b: inserted: before: 'a' has a text inserted itself",
        ),
        ({"a": {"inserted": {**PUT, "times": 0}}}, "tasks.a.inserted.times"),
        ({"a": {"inserted": {**PUT, "text": ""}}}, "tasks.a.inserted.text"),
        ({"a": {"inserted": {"text": "/ "}}}, "tasks.a.inserted.before"),
    ],
)
def test_what_is_refused(tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError) as caught:
        config(**tasks)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
