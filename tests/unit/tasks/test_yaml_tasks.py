"""What a task asks a model for, read from its YAML without lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsity_atlas.tasks import yaml_tasks


def test_what_a_task_asks_a_model_for(tmp_path: Path) -> None:
    files = {
        "base": {"output_type": "multiple_choice", "doc_to_text": ""},
        "options": {"task": "options", "include": "base.yaml"},
        "pages": {"task": "pages", "tag": "ours", "output_type": "loglikelihood_rolling"},
        "stories": {"task": "stories", "tag": "ours"},
        "both": {"group": "both", "task": ["options", "stories"]},
        "theirs": {"group": "theirs", "task": ["options", "gsm8k"]},
        "written": {"group": "written", "task": [{"task": "options", "output_type": "?"}]},
        "own": {"task": "own", "class": "!function own.Own"},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def found(name: str, **override: Any) -> set[str] | None:
        return yaml_tasks.output_types(str(tmp_path), name, override)

    assert found("options") == {"multiple_choice"}
    # lm-eval generates where nothing is said.
    assert found("stories") == {"generate_until"}
    assert found("options", output_type="generate_until") == {"generate_until"}
    assert found("both") == {"multiple_choice", "generate_until"}
    assert found("ours") == {"loglikelihood_rolling", "generate_until"}
    for name in ("theirs", "written", "own"):
        assert found(name) is None
    # A task of lm-eval's own, beside those of the folder or without one.
    assert found("gsm8k") == {"generate_until"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *(("arc_easy", {"multiple_choice"}), ("arc_challenge", {"multiple_choice"})),
        *(("lambada_openai", {"loglikelihood"}), ("wikitext", {"loglikelihood_rolling"})),
        *(("winogrande", {"multiple_choice"}), ("gsm8k", {"generate_until"})),
        # Groups, tasks in another folder than their names say, and none at all.
        *(("blimp", None), ("mmlu", None), ("boolq", None), ("no_such_task", None), ("", None)),
        *(("../arc/arc_easy", None), ("a" * 300, None), ("a\0b", None)),
    ],
)
def test_what_tasks_of_lm_eval_s_own_ask_a_model_for(name: str, wanted: set[str] | None) -> None:
    assert yaml_tasks.output_types(None, name) == wanted
