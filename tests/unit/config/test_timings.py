"""Which curves are timed, and what of that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkout import ROOT
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.config.timings import Timing, timing_slice, timings
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.plan.jobs import jobs
from sparsity_atlas.plan.timing_cost import timing_seconds
from sparsity_atlas.rules.asks import Asks

BLOCK = {"models": ["small"], "criteria": ["topp"], "sites": ["input"], "levels": [0.5]}


def config_of(*blocks: dict[str, Any], **other: Any) -> Config:
    return parse(
        {
            "models": {"small": {"path": "small"}},
            "criteria": {"topp": {}, "topk": {}},
            "texts": {"prose": {"file": str(ROOT / "workflow/resources/text/prose.jsonl")}},
            "tasks": {"cloze": {"task": "atlas_cloze", "include": "tasks"}},
            "run": [BLOCK | one for one in blocks],
            **other,
        }
    )


def test_nothing_is_timed_unless_it_is_asked_for() -> None:
    config = config_of({})
    assert timings(config) == {}
    assert Asks(config, "results").timing_files() == []


def test_blocks_that_share_a_curve_are_united() -> None:
    config = config_of(
        {"speed": {"device": "cuda", "tokens": [4, 1]}},
        {"criteria": ["topp", "topk"], "speed": {"device": "cuda", "contexts": [], "tokens": [2]}},
        {"sites": ["up"]},
    )
    assert timings(config) == {
        ("small", "topp", "input"): Timing("cuda", "bfloat16", (512,), (1, 2, 4)),
        ("small", "topk", "input"): Timing("cuda", "bfloat16", (), (2,)),
    }
    ask = Asks(config, "results")
    assert ask.timing_files() == [
        "results/small/topp/input/speed.parquet",
        "results/small/topk/input/speed.parquet",
    ]
    assert ask.timed_curves == '[["small", "topp", "input"], ["small", "topk", "input"]]'


def test_a_slice_holds_what_the_stage_uses() -> None:
    timing = Timing("cpu", "float32", (8,), (1,))
    calibrated = config_of({}, calibration={"tokens": 512})
    assert timing_slice(calibrated, timing) == (
        '{"calibration_tokens":512,"contexts":[8],"device":"cpu","dtype":"float32","tokens":[1]}'
    )


def test_two_devices_at_one_curve_are_refused() -> None:
    config = config_of({"speed": {"device": "cpu"}}, {"speed": {"device": "cuda"}})
    with pytest.raises(
        AtlasError, match=r"run\.1\.speed: device: found cuda.*asks for cpu at small/topp"
    ):
        timings(config)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"device": "mps"}, "run.0.speed.device"),
        ({}, "run.0.speed.device"),
        ({"device": "cpu", "dtype": "float16"}, "no kernel for float16 on a CPU"),
        ({"device": "cpu", "tokens": [17]}, "run.0.speed.tokens"),
        ({"device": "cpu", "tokens": []}, "the list is empty"),
        ({"device": "cpu", "contexts": [8, 8]}, "given twice: 8"),
        ({"device": "cpu", "batch": [1]}, "run.0.speed.batch"),
    ],
)
def test_what_cannot_be_timed_ends_in_one_line(asked: dict[str, Any], line: str) -> None:
    with pytest.raises(AtlasError, match=line) as raised:
        config_of({"speed": asked})
    assert "\n" not in str(raised.value)


def test_the_job_of_a_curve_that_is_timed(tmp_path: Path) -> None:
    config = config_of({"speed": {"device": "cpu"}}, {"sites": ["up"]})

    def found() -> list[tuple[str, tuple[str, str] | None, bool]]:
        every = jobs(config, tmp_path)
        return [(one.model, one.node, one.done) for one in every if one.rule == "speed"]

    assert found() == [("small", ("topp", "input"), False)]
    (tmp_path / "small/topp/input").mkdir(parents=True)
    (tmp_path / "small/topp/input/speed.parquet").touch()
    assert found() == [("small", ("topp", "input"), True)]


def test_a_plan_counts_tokens_batches_and_contexts() -> None:
    one = timing_seconds(Timing("cpu", "float32", (8,), (1,)), 10**6)
    assert timing_seconds(Timing("cpu", "float32", (8,), (1, 2)), 10**6) == pytest.approx(2 * one)
    assert timing_seconds(Timing("cpu", "float32", (), (1,)), 10**6) < one
    # Of a slow model a token is timed less often: ten times as slow takes no ten times as long.
    slow, slower = (
        timing_seconds(Timing("cpu", "float32", (8,), (1,)), n) for n in (10**9, 10**10)
    )
    assert slow < slower < 10 * slow
