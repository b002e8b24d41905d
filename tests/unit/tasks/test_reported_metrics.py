"""A metric that the configuration names is known to be there before the model runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.tasks.load import load_tasks
from sparsity_atlas.tasks.loaded import LoadedTask
from sparsity_atlas.tasks.reported_metrics import check_wanted
from tiny_lm import CHOICE, letter_documents, write_task

GENERATES = {"output_type": "generate_until", "doc_to_target": "answer", "doc_to_text": "Q:"}
METRICS = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def load(folder: Path, code: str, **config: Any) -> LoadedTask:
    """A task that scores by its own code."""
    documents = [{**one, "answer": "yes"} for one in letter_documents()]
    written = {**CHOICE, "metric_list": METRICS, **config}
    written = {key: value for key, value in written.items() if value is not None}
    entry = write_task(folder, "own", documents, **written)
    (folder / "u.py").write_text(code)
    with (folder / "own.yaml").open("a") as file:
        file.write("process_results: !function u.score\n")
    return load_tasks({"own": entry}, 0)["own"]


def test_a_metric_that_some_documents_lack_is_refused_before_anything_runs(tmp_path: Path) -> None:
    task = load(
        tmp_path,
        "seen = []\n"
        "def score(document, results):\n"
        "    if document not in seen: seen.append(document)\n"
        "    return {} if seen.index(document) in (1, 2) else {'acc': 1.0}\n",
    )
    count = len(letter_documents())
    with pytest.raises(
        AtlasError,
        match=rf"tasks\.own: metric: 'acc,none' is missing in 2 of {count} documents; choose one",
    ):
        check_wanted(task, "acc")


@pytest.mark.parametrize(
    "body",
    [
        "return {'acc': __import__('random').random()}",
        "return {'acc': 1.0} if results[0] == 'yes' else {}",  # of the right answer
        "return {} if results[0] == 'yes' else {'acc': 0.0}",  # of a wrong one
        "raise ValueError(results)",  # takes no answer of this form
        "return None",
        "return {} if results[0] else 1 / 0",
        "return {'acc': float(results[0][0][0] == 'x')} if results[0] else {'acc': 0.0}",
    ],
)
def test_what_follows_from_the_answer_is_left_to_the_run(tmp_path: Path, body: str) -> None:
    code = f"def score(document, results):\n    {body}\n"
    task = load(tmp_path, code, doc_to_choice=None, **GENERATES)
    before = random.getstate()
    check_wanted(task, "acc")
    assert random.getstate() == before


@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood", "loglikelihood_rolling"])
def test_answers_have_the_form_that_lm_eval_gives_them(tmp_path: Path, kind: str) -> None:
    code = {
        "multiple_choice": "lls, greedy = zip(*results)\n    assert len(lls) > 1",
        "loglikelihood": "((ll, greedy),) = results",
        "loglikelihood_rolling": "(ll,) = results\n    assert ll < 0",
    }[kind]
    text = f"def score(document, results):\n    {code}\n    return {{}}\n"
    config = {} if kind == "multiple_choice" else {"doc_to_choice": None, "doc_to_target": "answer"}
    task = load(tmp_path, text, output_type=kind, **config)
    with pytest.raises(AtlasError, match="is missing in"):
        check_wanted(task, "acc")
