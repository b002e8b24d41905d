"""Prompts are lm-eval's, token by token; where they are not, on purpose, that is held here too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plain_lm import answers, assert_same, assert_same_prompts, flat, merged, plainly, through_atlas
from sparsity_atlas.evaluate import Session
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
BOS = [None, True, False]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One task of each request type."""
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "choice": write_task(folder, "choice", choice_documents(3), **CHOICE),
        "rolling": write_task(folder, "rolling", rolling_documents(4), **ROLLING),
        "last": write_task(folder, "last", rolling_documents(3, 3), **LAST_WORD),
        "words": write_task(folder, "words", rolling_documents(3, 4), **GENERATION),
    }


class Place:
    """A model's folder, and the sessions and plain runs over it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = save_model(folder / "model", **options)
        self.describe()

    def describe(self) -> None:
        """Write the manifest, anew after an edit."""
        self.manifest = write_model_manifest(self.folder, self.folder.with_suffix(".json"))

    def session(self, tasks: dict[str, Any], **changes: Any) -> Session:
        return open_session(self.manifest, tasks, **changes)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Place]:
    """The same model with a tokenizer that puts no BOS token by itself, and with one that does."""
    return {own: Place(tmp_path_factory.mktemp("models"), bos=own) for own in (False, True)}


@pytest.mark.parametrize("bos", BOS)
@pytest.mark.parametrize("own", [False, True])
def test_one_bos_before_a_whole_text_or_lm_eval_s_number(
    places: dict, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool, bos: Any
) -> None:
    one = {"rolling": tasks["rolling"]}
    include = Path(tasks["rolling"]["include"])
    # What lm-eval gives where the tokenizer puts none: its prefix token is the only BOS.
    single = plainly(places[False].session(one), "rolling", include, 4)
    session = places[own].session(one, add_bos_token=bos)
    outcomes = through_atlas(session, None, tmp_path / "ours", monkeypatch)
    assert_same(outcomes["rolling"], single)
    session = places[own].session(one, add_bos_token=bos, lm_eval_prefix=True)
    outcomes = through_atlas(session, None, tmp_path / "theirs", monkeypatch)
    plain = plainly(session, "rolling", include, 4, lm={"add_bos_token": bos})
    assert_same(outcomes["rolling"], plain)
    twice = bos or (own and bos is None)
    assert (answers(plain) != answers(single)) is bool(twice)
    for name, prefix in (("ours", False), ("theirs", True)):
        run = json.loads((tmp_path / name / "eval.json").read_text())["run"]
        assert (run["bos"], run["lm_eval_prefix"]) == (bool(twice), prefix)


@pytest.mark.parametrize("own", [False, True])
def test_a_text_that_itself_begins_with_bos(
    places: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    pages = rolling_documents(2)
    written = [{"page": "<s>" + document["page"]} for document in pages]
    entries = {
        "bare": write_task(tmp_path, "bare", pages, **ROLLING),
        "written": write_task(tmp_path, "written", written, **ROLLING),
    }
    outcomes = through_atlas(places[own].session(entries), None, tmp_path / "dense", monkeypatch)
    bare, marked = ([answer[0] for answer in answers(outcomes[name]).values()] for name in entries)
    assert flat(bare) == pytest.approx(flat(marked))


# What a chat template may do about BOS and about thinking.
TEMPLATES = {
    "plain": CHAT,
    "writes-bos": "{{ bos_token }}" + CHAT,
    "thinks": CHAT.replace("<assistant> ", "<assistant> <think>\\n"),
}


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Tasks of each request type with a chat in view: turns of examples, a begun answer, a description."""
    folder = tmp_path_factory.mktemp("talks")
    shots = {"fewshot_split": "test", "num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}}
    described = {"description": "Say which. "}
    return {
        "shots": write_task(folder, "shots", choice_documents(3), **CHOICE, **shots),
        "begun": write_task(folder, "begun", choice_documents(2), **CHOICE, gen_prefix="So:"),
        "rolling": write_task(folder, "rolling", rolling_documents(2, 3)[1:], **ROLLING),
        "last": write_task(folder, "last", rolling_documents(3, 3), **LAST_WORD, **described),
        "words": write_task(folder, "words", rolling_documents(3, 4), **GENERATION),
        "opened": write_task(
            folder, "opened", rolling_documents(3, 5), **GENERATION, gen_prefix="It is ", **shots
        ),
    }


@pytest.mark.parametrize("bos", BOS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_prompts(
    talks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, own: bool, bos: Any
) -> None:
    place = Place(tmp_path, bos=own, max_position_embeddings=160)
    (place.folder / "chat_template.jinja").write_text(TEMPLATES[template])
    place.describe()
    session = place.session(talks, add_bos_token=bos, apply_chat_template=True, lm_eval_prefix=True)
    outcomes = through_atlas(session, None, tmp_path / "dense", monkeypatch)
    plain = plainly(
        *(session, list(talks), Path(talks["shots"]["include"]), 4),
        lm={"add_bos_token": bos},
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    assert_same_prompts(merged(outcomes), plain)
    context = outcomes["shots"]["samples"]["shots"][0]["arguments"][0][0]
    assert context.count("<assistant>") == 3
    assert ("<think>" in context) is (template == "thinks")
