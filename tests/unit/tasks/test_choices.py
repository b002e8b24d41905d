"""Accuracies of choices made all at once are lm-eval's, which makes them one by one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from sparsity_atlas.tasks.choices import Choices, can_score, grouped
from sparsity_atlas.tasks.load import load_tasks
from tiny_lm import CHOICE, write_task

METRICS = [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}]
FORMS = {
    "numbers": {"doc_to_target": "label"},
    "words": {"doc_to_target": "word"},
    "several": {"doc_to_target": "labels"},
    "beginnings": {"doc_to_text": "label", "doc_to_target": "context"},
}


def documents() -> list[dict[str, Any]]:
    """Questions of two to four options; of some the label is none of them, or an option is repeated."""
    draw = random.Random(0)
    found = []
    for number in range(40):
        choices = [draw.choice(["a", "bb", "ccc", "ü", "日本語"]) for _ in range(number % 3 + 2)]
        label = draw.randrange(len(choices)) if number % 7 != 5 else 9
        found.append(
            {
                "context": "old cat",
                "choices": choices,
                "label": label,
                "word": choices[label] if label < len(choices) else "none",
                "labels": [label, 0] if number % 5 else [0],
            }
        )
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_document_scores_as_lm_eval_has_it(form: str, tmp_path: Path) -> None:
    config = {**CHOICE, "metric_list": METRICS, **FORMS[form]}
    entry = write_task(tmp_path / "tasks", form, documents(), **config)
    (task,) = load_tasks({form: entry}, 0)[form].leaves.values()
    assert can_score(task)
    draw = random.Random(1)
    instances = []
    every = list(task.eval_docs)
    for number, document in enumerate(every):
        for place in range(len(document["choices"])):
            one = Instance("loglikelihood", document, ("", ""), place, metadata=(form, number, 1))
            # Of few values, so that scores tie.
            one.filtered_resps["none"] = (-float(draw.randint(1, 4)), False)
            instances.append(one)
    draw.shuffle(instances)
    found = Choices(task, grouped(task, every, instances), instances).score("none")
    left = 0
    for number, document in enumerate(every):
        own = sorted((one for one in instances if one.doc_id == number), key=lambda one: one.idx)
        expected = task.process_results(document, [one.filtered_resps["none"] for one in own])
        if found[number] is None:
            left += 1
            continue
        assert list(found[number].items()) == list(expected.items())
        assert all(type(value) is float for value in found[number].values())
    # The documents whose label is none of the options, of which lm-eval warns.
    assert left == (4 if form == "several" else 5)


@pytest.mark.parametrize(
    "more",
    [
        {"metric_list": [{"metric": "acc"}, {"metric": "brier_score"}]},
        {"filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}]},
    ],
)
def test_what_needs_more_is_left_to_lm_eval(more: dict[str, Any], tmp_path: Path) -> None:
    entry = write_task(tmp_path / "tasks", "other", documents(), **{**CHOICE, **more})
    (task,) = load_tasks({"other": entry}, 0)["other"].leaves.values()
    assert not can_score(task)
