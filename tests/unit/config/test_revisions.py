"""Checkpoints along a training become models of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsity_atlas.config import grid
from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.rules.asks import Asks
from sparsity_atlas.rules.inputs import check_inputs

BASE: dict[str, Any] = {
    "criteria": {"topp": {}},
    "texts": {"prose": {"file": "prose.txt"}},
    "tasks": {"prose": {}},
    "run": [{"models": ["m"], "sites": ["input"], "levels": [0.9]}],
}


def configured(entry: dict[str, Any], **other: Any) -> Config:
    return parse({**BASE, "models": {"m": entry}, **other})


def test_each_revision_of_the_hub_is_a_model() -> None:
    entry = {"hub": "a/b", "dtype": "float32", "tokens_per_step": 100}
    config = configured({**entry, "revisions": ["step10", "step200"]})
    assert grid.models(config) == ("m-step10", "m-step200")
    assert [curve.folder for curve in grid.curves(config)] == [
        f"m-step{count}/topp/input" for count in (10, 200)
    ]
    assert json.loads(grid.fetch_slice(config, "m-step200")) == {
        "hub": "a/b",
        "revision": "step200",
    }
    assert config.models["m-step10"].dtype == "float32"
    assert grid.checkpoints(config) == {
        "m-step10": Checkpoint("m", "step10", 1000),
        "m-step200": Checkpoint("m", "step200", 20000),
    }
    # What a job is given, and what is written down, is the same again.
    written = json.loads(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    assert parse(written).model_dump() == config.model_dump()
    assert json.loads(Asks(config, "results").checkpoints) == {
        "m-step10": ["m", "step10", 1000],
        "m-step200": ["m", "step200", 20000],
    }


def test_revisions_of_a_folder_are_folders_in_it() -> None:
    own = {"early": {"revision": "checkpoint-5", "tokens": 5}, 10: {"tokens": 1e3}}
    config = configured({"path": "out", "revisions": own})
    sources = [json.loads(grid.fetch_slice(config, name)) for name in ("m-early", "m-10")]
    assert sources == [{"path": "out/checkpoint-5"}, {"path": "out/10"}]
    assert [one.revision for one in grid.checkpoints(config).values()] == ["early", "10"]


def test_some_revisions_may_be_chosen_and_compared() -> None:
    revisions = {name: {"tokens": 1} for name in "abc"}
    config = configured(
        {"hub": "a/b", "revisions": revisions},
        run=[{"models": ["m-c", "m"], "sites": ["input"]}, {"models": ["m-a"], "sites": ["gate"]}],
        compare=[["m-a", "m-c"]],
    )
    assert [block.models for block in config.run] == [["m-c", "m-a", "m-b"], ["m-a"]]
    assert grid.pairs(config) == (("m-a", "m-c"),)


def test_a_change_of_tokens_measures_nothing_again() -> None:
    few, many = (
        configured({"hub": "a/b", "revisions": {"x": {"tokens": count}}}) for count in (1, 2)
    )
    for one in (grid.fetch_slice, grid.capture_slice, grid.store_slice, grid.error_slice):
        assert one(few, "m-x") == one(many, "m-x")
    assert grid.evaluation_slice(few, "m-x", ("prose",)) == grid.evaluation_slice(
        many, "m-x", ("prose",)
    )


@pytest.mark.parametrize(
    ("revision", "per_step", "tokens"),
    [
        ("step1000-tokens4B", None, 4e9),
        ("stage1-step1000-tokens2.5T", 7, 2.5e12),
        ("stage2-ingredient1-step1000-tokens3B", 7, None),  # of that stage alone
        ("step1000", 2097152, 2097152000),
        ("checkpoint-20", 3, 60),
        ("20", 3, 60),
        ("step0", 3, None),  # no training yet, and no place on a logarithmic axis
        ("step1000", None, None),
        ("main", 3, None),
    ],
)
def test_tokens_that_a_name_tells(
    revision: str, per_step: int | None, tokens: float | None
) -> None:
    config = configured(
        {"hub": "a/b", "revisions": [revision], "tokens_per_step": per_step or 1}
        if per_step
        else {"hub": "a/b", "revisions": [revision]}
    )
    if tokens is None:
        with pytest.raises(
            AtlasError, match=f"models.m-{revision}: training tokens: not known; give"
        ):
            grid.checkpoints(config)
    else:
        assert grid.checkpoints(config)[f"m-{revision}"].tokens == tokens


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("training.json", {"tokens_seen": 12288, "steps_done": 3}),
        ("trainer_state.json", {"num_input_tokens_seen": 12288}),
    ],
)
def test_tokens_that_a_checkpoint_tells(tmp_path: Path, file: str, content: dict) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / file).write_text(json.dumps(content))
    config = configured({"path": str(tmp_path), "revisions": ["early"]})
    assert grid.checkpoints(config)["m-early"].tokens == 12288
    alone = configured({"path": str(tmp_path / "early"), "series": "a"})
    assert grid.checkpoints(alone) == {"m": Checkpoint("a", "m", 12288)}
    (tmp_path / "early" / file).write_text("{")
    with pytest.raises(AtlasError, match=rf"{file}: not readable \("):
        check_inputs(config)


def test_a_revision_whose_folder_is_missing() -> None:
    config = configured({"path": "nowhere", "revisions": ["early"]})
    with pytest.raises(AtlasError, match=r"models.m-early: nowhere/early: no such folder"):
        check_inputs(config)


def test_a_recorded_count_of_nothing_is_none(tmp_path: Path) -> None:
    # transformers writes 0 where it was not told to count.
    (tmp_path / "trainer_state.json").write_text('{"num_input_tokens_seen": 0}')
    config = configured({"path": str(tmp_path), "series": "a"})
    with pytest.raises(AtlasError, match=r"models.m: training tokens: not known"):
        check_inputs(config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"revisions": []}, "models.m.revisions: the list is empty"),
        ({"revisions": {}}, "models.m.revisions: the mapping is empty"),
        ({"revisions": 3}, "models.m.revisions: a list or a mapping of revisions is wanted"),
        ({"revisions": ["a", "a"]}, "models.m.revisions: given twice: a"),
        ({"revisions": [True]}, r"models.m.revisions.0: .*valid string"),
        ({"revisions": ["a/b"]}, "models.m.revisions.0: it ends a model's name"),
        ({"revisions": ["a.json"]}, "models.m.revisions.a.json: 'm-a.json': .*ends like a file"),
        ({"revisions": {"a": {"token": 3}}}, "models.m.revisions.a.token: unknown key"),
        ({"revisions": {"a": {"tokens": -3}}}, "models.m.revisions.a.tokens: .*greater than 0"),
        ({"revisions": {"a": 7}}, "models.m.revisions.a: a mapping is wanted"),
        ({"revisions": ["a"], "revision": "x"}, "give either `revisions` or `revision`, not both"),
        ({"revisions": ["a"], "series": "x"}, "give either `revisions` or `series`, not both"),
        ({"tokens_per_step": 3}, "`tokens_per_step` belongs to `revisions`"),
        ({"training_tokens": 3}, "`training_tokens` belongs to a `series`"),
        ({"hub": None, "gguf": "m.gguf", "revisions": ["a"]}, "`revisions` are of a `hub`"),
    ],
)
def test_what_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError, match=message) as error:
        configured({"hub": "a/b", **entry})
    assert "\n" not in str(error.value)


def test_names_that_two_would_have() -> None:
    models = {"m": {"hub": "a/b", "revisions": ["x"]}, "M-x": {"hub": "a/c"}}
    with pytest.raises(
        AtlasError, match=r"models.m.revisions.x: 'm-x' is the name of models.M-x, too"
    ):
        parse({**BASE, "models": models})


def test_an_entry_with_revisions_is_no_model_of_a_pair() -> None:
    entry = {"hub": "a/b", "revisions": ["step10", "step20"]}
    with pytest.raises(AtlasError, match=r"compare.0: unknown 'm'.*known: m-step10, m-step20"):
        configured(entry, compare=[["m", "m-step10"]])
    with pytest.raises(AtlasError, match=r"run.0.models: unknown 'm-step30' \(did you mean"):
        configured(entry, run=[{"models": ["m-step30"]}])
