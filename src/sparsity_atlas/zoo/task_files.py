"""The files that lm-eval reads: task descriptions (YAML) and their items (JSONL)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The data file is named relative to the task's own folder.
CHOICE = """\
# {about}
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: {text}
target_delimiter: "{delimiter}"
doc_to_choice: choices
doc_to_target: answer
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

GROUP = """\
# All minimal pairs; the mean counts every item once.
group: {group}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1
"""


def choice_task(task: str, data: str, about: str, context: str | None = None) -> str:
    """A multiple-choice task over items with `choices` and `answer`, as YAML.

    `context` names the field that comes before the choices; without it each choice is a whole
    sentence, scored from the beginning-of-sequence token on.
    """
    return CHOICE.format(
        task=task,
        data=data,
        about=about,
        text=context or '""',
        delimiter=" " if context else "",
    )


def group_task(group: str, tasks: Iterable[str]) -> str:
    """A group of tasks with their mean accuracy, as YAML."""
    return GROUP.format(group=group, tasks="\n".join(f"  - {task}" for task in tasks))


def write_jsonl(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """One item a line; the same items give the same bytes everywhere."""
    lines = [json.dumps(item, ensure_ascii=False, separators=(",", ":")) + "\n" for item in items]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
