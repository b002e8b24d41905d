"""What holds while code of a task runs."""

from __future__ import annotations

import pytest
from lm_eval import utils

from sparsity_atlas.tasks.loaded import compiled_once


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = utils.env.from_string

    def compile_(source: str) -> object:
        compiled.append(source)
        return original(source)

    monkeypatch.setattr(utils.env, "from_string", compile_)
    with compiled_once():
        texts = [utils.apply_template("{{a}} cat", {"a": word}) for word in ("old", "young")]
        texts.append(utils.apply_template("{{a}} dog", {"a": "old"}))
    assert texts == ["old cat", "young cat", "old dog"]
    assert compiled == ["{{a}} cat", "{{a}} dog"]
    utils.apply_template("{{a}} cat", {"a": "old"})
    assert len(compiled) == 3
