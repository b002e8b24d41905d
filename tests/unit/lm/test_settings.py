"""Every setting of a model or a task has the effect that it has in lm-eval, on each type of request."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from plain_lm import assert_same_prompts, flat, merged, plainly, through_atlas
from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.lm import chat
from tiny_lm import (
    CHAT,
    CHOICE,
    GENERATION,
    LAST_WORD,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    save_model,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# It prints the day, and a thinking block if it is told to.
TEMPLATE = "{{ strftime_now('%d %b %Y') }}" + CHAT.replace(
    "<assistant> ", "<assistant> {{ '<think>' if enable_thinking else '' }}"
)
TASKS = ("choice", "last", "words", "rolling")
PROMPTED, ALL = set(TASKS[:3]), set(TASKS)  # whole texts have no prompt


@dataclass(frozen=True)
class Case:
    """A setting, how lm-eval is told the same, and the tasks whose requests or answers it changes.

    Attributes:
        changes: these tasks.
        model: in the model's entry.
        task: in each task's entry.
        lm: HFLM's arguments.
        options: of `lm_eval.simple_evaluate`.
        beside: other keys of the model's entry.
        only: tasks that can be run with it.
    """

    changes: set[str]
    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    lm: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = TASKS


def chatting(changes: set[str], model: dict[str, Any], **more: Any) -> Case:
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, **more.pop("options", {})}
    return Case(changes, model, beside={"apply_chat_template": True}, options=options, **more)


def override(
    changes: set[str], shots: int | None = None, only: tuple[str, ...] = TASKS, **keys: Any
) -> Case:
    count = {} if shots is None else {"num_fewshot": shots}
    return Case(changes, task={"override": keys, **count}, options=count, only=only)


FILTERS = [{"name": "up", "filter": [{"function": "uppercase"}, {"function": "take_first"}]}]
SHORT = {"until": ["r"], "max_gen_toks": 3}
CASES = {
    "add_bos_token": Case(
        ALL, {"add_bos_token": True, "lm_eval_prefix": True}, lm={"add_bos_token": True}
    ),
    "max_length": Case(ALL, {"max_length": 24}, lm={"max_length": 24}),
    "batch_size": Case(set(), {"batch_size": 1}),
    "apply_chat_template": Case(
        PROMPTED,
        {"apply_chat_template": True},
        options={"apply_chat_template": True, "fewshot_as_multiturn": True},
    ),
    "chat_date": chatting(PROMPTED, {"chat_date": "2001-02-03"}),
    "chat_template_args": chatting(
        PROMPTED,
        {"chat_template_args": {"enable_thinking": True}},
        lm={"chat_template_args": {"enable_thinking": True}},
    ),
    "system_instruction": Case(
        PROMPTED, {"system_instruction": "Be brief."}, options={"system_instruction": "Be brief."}
    ),
    "system_instruction-chat": chatting(
        PROMPTED, {"system_instruction": "Be brief."}, options={"system_instruction": "Be brief."}
    ),
    "gen_kwargs": Case({"words"}, {"gen_kwargs": SHORT}, options={"gen_kwargs": SHORT}),
    "gen_kwargs-override": Case(
        {"words"},
        {"gen_kwargs": {"max_gen_toks": 3}},
        {"override": {"generation_kwargs": {"until": ["i"], "max_gen_toks": 9}}},
        options={"gen_kwargs": {"max_gen_toks": 3}},
    ),
    "max_gen_toks": Case(
        {"words"},
        task={"max_gen_toks": 3},
        options={"gen_kwargs": {"max_gen_toks": 3}},
        only=("words",),
    ),
    "max_gen_toks-gen_kwargs": Case(
        {"words"},
        {"gen_kwargs": {"max_gen_toks": 2}},
        {"max_gen_toks": 5},
        options={"gen_kwargs": {"max_gen_toks": 2}},
        only=("words",),
    ),
    "num_fewshot-chat": chatting(PROMPTED, {}, task={"num_fewshot": 2}, options={"num_fewshot": 2}),
    "fewshot_as_multiturn": chatting(
        PROMPTED,
        {"fewshot_as_multiturn": False},
        task={"num_fewshot": 2},
        options={"num_fewshot": 2, "fewshot_as_multiturn": False},
    ),
    "think_end_token": Case({"words"}, {"think_end_token": "h"}, lm={"think_end_token": "h"}),
    "num_fewshot": Case(PROMPTED, task={"num_fewshot": 2}, options={"num_fewshot": 2}),
    "limit": Case(ALL, task={"limit": 2}, options={"limit": 2}),
    "seed": Case(
        PROMPTED,
        {"seed": 7},
        {"num_fewshot": 2},
        options={"fewshot_random_seed": 7, "num_fewshot": 2},
    ),
    "doc_to_text": override(PROMPTED, doc_to_text="{{ context[:9] }}"),
    "target_delimiter": override({"choice"}, target_delimiter=":: "),
    "target_delimiter-shots": override(PROMPTED, 1, target_delimiter=":: "),
    "fewshot_delimiter": override(PROMPTED, 2, fewshot_delimiter=" // "),
    "description": override(PROMPTED, description="Say which. "),
    "gen_prefix": override(PROMPTED, gen_prefix="So"),
    "repeats": override(ALL, repeats=2),
    "filter_list": override({"words"}, only=("words",), filter_list=FILTERS),
    "generation_kwargs": override({"words"}, generation_kwargs=SHORT),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One task of each request type."""
    folder = tmp_path_factory.mktemp("tasks")
    shots = {"fewshot_split": "test"}
    pages = [{**one, "context": one["page"]} for one in rolling_documents(4, 4)]
    return {
        "choice": write_task(folder, "choice", choice_documents(4), **CHOICE, **shots),
        "rolling": write_task(folder, "rolling", pages, **ROLLING),
        "last": write_task(folder, "last", pages, **LAST_WORD, **shots),
        "words": write_task(folder, "words", pages, **GENERATION, **shots),
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with that chat template."""
    folder = tmp_path_factory.mktemp("models")
    model = save_model(folder / "model", max_position_embeddings=300)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return write_model_manifest(model, folder / "model.json")


@pytest.fixture(scope="module")
def without(
    tasks: dict, manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """What comes of the tasks without the setting, with what stands beside it."""
    known: dict[str, dict[str, Any]] = {}

    def evaluated(beside: dict[str, Any], patch: pytest.MonkeyPatch) -> dict[str, Any]:
        if str(beside) not in known:
            folder = tmp_path_factory.mktemp("without")
            session = open_session(manifest, tasks, **beside)
            known[str(beside)] = merged(through_atlas(session, None, folder, patch))
        return known[str(beside)]

    return evaluated


def seen(outcome: dict[str, Any], task: str) -> str:
    """What of a task's evaluation a setting may change: prompts and answers, but for rounding."""
    samples = outcome["samples"][task]
    found = [flat([one["arguments"], one["resps"], one["filtered_resps"]]) for one in samples]
    return str([[round(v, 2) if isinstance(v, float) else v for v in one] for one in found])


@pytest.mark.parametrize("name", CASES)
def test_a_setting_has_lm_eval_s_effect(
    tasks: dict,
    manifest: Path,
    without: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    case = CASES[name]
    session = open_session(
        manifest, {task: tasks[task] | case.task for task in case.only}, **case.beside, **case.model
    )
    ours = merged(through_atlas(session, None, tmp_path, monkeypatch))
    batch_size = case.model.get("batch_size", 4)
    include = Path(tasks["words"]["include"])
    # As if the task's own file had said so.
    files = [yaml.safe_load((include / f"{task}.yaml").read_text()) for task in case.only]
    asked = [{**content, **case.task.get("override", {})} for content in files]
    with chat.on(session.lm.prompts.chat_date):  # as if lm-eval had been run on that day
        plain = plainly(session, asked, include, batch_size, lm=case.lm, **case.options)
    assert_same_prompts(ours, plain)
    before = without(case.beside, monkeypatch)
    assert {task for task in case.only if seen(ours, task) != seen(before, task)} == case.changes


def test_examples_are_turns_or_one_turn(tasks: dict, manifest: Path) -> None:
    def turns(**model: Any) -> list[str]:
        entry = {"last": tasks["last"] | {"num_fewshot": 2}}
        session = open_session(manifest, entry, apply_chat_template=True, **model)
        prompt = session.prepared("last").leaves["last"].instances[0].args[0]
        return re.findall(r"<(\w+)> ", prompt)

    assert turns() == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert turns(fewshot_as_multiturn=False) == ["user", "assistant"]


def test_a_budget_of_what_generates_nothing(tasks: dict, manifest: Path) -> None:
    session = open_session(manifest, {"last": tasks["last"] | {"max_gen_toks": 5}})
    with pytest.raises(TaskFailure, match=r"^max_gen_toks: 'last' generates nothing$"):
        session.prepared("last")


def test_examples_that_a_task_does_without(
    tasks: dict, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strict = write_task(
        *(tmp_path, "strict", choice_documents(4)), **CHOICE, fewshot_split="test", num_fewshot=0
    )

    def prompt(entry: dict[str, Any]) -> str:
        leaves = open_session(manifest, {"strict": entry}).prepared("strict").leaves
        return leaves["strict"].instances[0].args[0]

    alone = prompt(strict)
    assert "num_fewshot" not in caplog.text
    with caplog.at_level("INFO", "sparsity_atlas"):
        assert prompt(strict | {"num_fewshot": 2}) == alone
    assert "'strict': num_fewshot: 2 has no effect" in caplog.text
    shown = prompt(strict | {"num_fewshot": 2, "override": {"num_fewshot": 2}})
    assert shown.count("\n\n") == 2
