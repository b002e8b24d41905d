"""What is left to transformers' own loop, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.lm.continuous.able import refusal
from tiny_lm import open_session
from tiny_models import tiny_model

OPTIONS = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"top_p": 0.9, "top_k": 5}, None),  # of sampling, which is not asked for
        ({"do_sample": True, "temperature": 1.0}, "do_sample"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_new_tokens": 3, "max_length": 40}, "max_length, min_new_tokens"),
    ],
)
def test_options_of_a_task(manifest: Path, changes: dict[str, Any], named: str | None) -> None:
    session = open_session(manifest, {})
    with session.attach(None) as counter:
        found = refusal(session.lm.model, counter, OPTIONS | changes)
    assert found is None if named is None else named in str(found)


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("repetition_penalty", 1.2, "RepetitionPenalty"),
        ("min_new_tokens", 3, "MinNewTokens"),
        ("suppress_tokens", [5], "SuppressTokens"),
        ("temperature", 0.5, None),
    ],
)
def test_what_the_model_s_own_configuration_asks_for(
    manifest: Path, setting: str, value: object, named: str | None
) -> None:
    session = open_session(manifest, {})
    setattr(session.lm.model.generation_config, setting, value)
    with session.attach(None) as counter:
        found = refusal(session.lm.model, counter, OPTIONS)
    assert found is None if named is None else named in str(found)


def test_rules_that_look_at_a_sequence(manifest: Path) -> None:
    session = open_session(manifest, {})
    with session.attach(Node.make({"rule": "prompt_mask"}, "intermediate", "0.5")) as counter:
        assert "more than the token" in str(refusal(session.lm.model, counter, OPTIONS))


def test_mixtures_and_classes_without_a_cache(manifest: Path) -> None:
    session = open_session(manifest, {})
    with session.attach(None) as counter:
        assert "no positions" in str(refusal(tiny_model("rwkv"), counter, OPTIONS))
        session.lm.model.hf_device_map = {"a": 0, "b": 1}
        assert "devices" in str(refusal(session.lm.model, counter, OPTIONS))
        del session.lm.model.hf_device_map
        counter.by_expert.slots = counter.slots
        assert "by expert" in str(refusal(session.lm.model, counter, OPTIONS))
