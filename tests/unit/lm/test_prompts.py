"""Prompts are lm-eval's, token by token; where they are not, on purpose, that is held here too."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers.utils import chat_template_utils

from plain_lm import answers, assert_same, assert_same_prompts, flat, merged, plainly, through_atlas
from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.lm import work
from sparsity_atlas.tasks.insertion.opening import behind
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


PAIRS = [
    *(("the old cat", " sees a bird"), ("the old cat", " hides"), ("the old cat  ", "sees")),
    *(("<s>the old cat", " sees"), ("", "the old bird")),
]
TEXTS = {
    "loglikelihood": PAIRS,
    "loglikelihood_rolling": [(context + answer,) for context, answer in PAIRS],
    "generate_until": [(context + answer, {}) for context, answer in PAIRS],
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("bos", BOS)
@pytest.mark.parametrize("own", [False, True])
def test_texts_are_tokenised_together_as_one_by_one(
    places: dict[bool, Place],
    own: bool,
    bos: bool | None,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = places[own].session({}, add_bos_token=bos).lm
    requests = [Instance(kind, {}, one, 0, metadata=("texts", 0, 1)) for one in TEXTS[kind]]
    alone: list[str] = []
    original = type(lm.tokenizer).encode

    def encode(self: Any, text: str, **options: Any) -> list[int]:
        alone.append(text)
        return original(self, text, **options)

    monkeypatch.setattr(type(lm.tokenizer), "encode", encode)
    together = lm.encode(kind, requests)
    # Those whose BOS is written are read in another way; so is an answer without context.
    assert all(text.startswith("<s>") or text == "the old bird" for text in alone)
    monkeypatch.setattr(type(lm), "_tokenised", lambda *_: contextlib.nullcontext())
    assert together == lm.encode(kind, requests)


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


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, str], Place]:
    """The same model with either tokenizer, as in `places`, and a chat template."""

    @functools.cache
    def made(own: bool, template: str) -> Place:
        folder = tmp_path_factory.mktemp("talking")
        place = Place(folder, bos=own, max_position_embeddings=160)
        (place.folder / "chat_template.jinja").write_text(TEMPLATES[template])
        place.describe()
        return place

    return made


@pytest.mark.parametrize("bos", BOS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_prompts(
    talks: dict,
    talking: Callable[[bool, str], Place],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    own: bool,
    bos: Any,
) -> None:
    session = talking(own, template).session(
        talks, add_bos_token=bos, apply_chat_template=True, lm_eval_prefix=True
    )
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


def test_a_text_begins_the_user_s_first_message(
    talks: dict, talking: Callable[[bool, str], Place]
) -> None:
    """Behind the system's message, before the first example; what is scored stays the same."""
    place = talking(False, "plain")
    put = {"inserted": {"text": "/ ", "times": 4}}
    both = {"shots": talks["shots"], "shots_behind": {**talks["shots"], **put}}
    session = place.session(both, apply_chat_template=True, system_instruction="Be brief.")
    plain, behind = (session.prepared(name).leaves["shots"].instances for name in both)
    assert len(plain) == len(behind) > 0
    for one, other in zip(plain, behind, strict=True):
        assert other.args[1] == one.args[1]
        before, _, rest = one.args[0].partition("<user> ")
        assert "Be brief." in before
        assert other.args[0] == f"{before}<user> / / / / {rest}"
    assert session.tasks["shots_behind"].identity != session.tasks["shots"].identity
    assert session.tasks["shots_behind"].as_it_is().identity == session.tasks["shots"].identity


def test_a_text_after_which_an_answer_would_be_read_in_another_way_is_refused() -> None:
    class Reads:
        """Reads an answer behind a slash as another token."""

        def encode(self, kind: str, requests: list[Any]) -> list[tuple[list[int], list[int]]]:
            return [([1], [3 if one.args[0].startswith("/") else 2]) for one in requests]

        def tok_encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [9]

    class Asked:
        task_name, doc_id, args = "t", 7, ("why", "so")

        @property
        def arguments(self) -> tuple[str, ...]:
            return self.args

        @arguments.setter
        def arguments(self, given: tuple[str, ...]) -> None:
            self.args = given

    with pytest.raises(TaskFailure, match=r"'t', document 7: inserted: the tokens of 'so' would"):
        behind(Reads(), "loglikelihood", [Asked()], "/ ")  # type: ignore[arg-type]


def test_windows_behind_a_text_leave_room_for_it() -> None:
    limits = work.Limits(batch_size=1, max_length=6, prefix_token=1)
    tokens = list(range(10, 19))
    found = work.behind(limits, 6, tokens, [7, 7])
    first = ([1, 7, 7], [10, 11, 12, 13])
    # The last window is filled up with what stands before it, as lm-eval fills it.
    assert found == [first, ([13], [14, 15, 16, 17]), ([14, 15, 16, 17], [18])]
    assert work.behind(limits, 6, tokens) == work.windows(tokens, limits, 6)
    assert work.behind(limits, 6, [], [7]) == []
    with pytest.raises(TaskFailure, match="inserted: 6 tokens before a document, of which the"):
        work.behind(limits, 6, tokens, [7] * 6)


def clock(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    """Let transformers' chat templates believe in a day of January 2031."""

    class Fake(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls(2031, 1, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Fake)


def test_a_template_s_date_stands_still(
    tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, chat=True, max_position_embeddings=160)
    one = {"choice": tasks["choice"]}
    chatting = {"apply_chat_template": True}

    def contexts(session: Session) -> set[str]:
        samples = session.prepared("choice").leaves["choice"].instances
        return {sample.args[0].split("<")[0] for sample in samples}

    plain = place.session(one, **chatting, chat_date="2030-02-03")
    assert "chat_date" not in plain.identity
    (place.folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHAT)
    place.describe()
    found = []
    for day in (1, 2):
        clock(monkeypatch, day)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{day}"))
        session = place.session(one, **chatting)
        found.append((contexts(session), session.identity))
        (theirs,) = [HFLM.apply_chat_template(session.lm, [{"role": "user", "content": "x"}])]
        assert theirs.startswith(f"0{day} Jan 2031")  # the clock is believed in
    assert found[0] == found[1]
    assert found[0][0] == {"26 Jul 2024"}
    # On the same machine, whose cache holds prompts of the other date.
    other = place.session(one, **chatting, chat_date="2030-02-03")
    assert contexts(other) == {"03 Feb 2030"}
    assert other.identity == found[0][1] | {"chat_date": "2030-02-03"}


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no such role') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (REFUSES + CHAT, "no such role"),
        ("{% for message in messages[-1:] %}{{ message['content'] }}{% endfor %}", "not print it"),
    ],
)
def test_a_template_without_system_messages(
    talks: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, reason: str
) -> None:
    place = Place(tmp_path)
    (place.folder / "chat_template.jinja").write_text(template)
    place.describe()
    described = {"last": talks["last"]}
    with pytest.raises(AtlasError, match=f"system_instruction: the chat template .*{reason}"):
        place.session(described, apply_chat_template=True, system_instruction="Be brief.")
    with caplog.at_level("INFO", "sparsity_atlas"):
        place.session(described, apply_chat_template=True).prepared("last")
    assert caplog.text.count("descriptions of tasks are left out") == 1
    # Without the template, the instruction is plain text.
    place.session(described, system_instruction="Be brief.").prepared("last")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('say it otherwise') }}", "say it otherwise"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    ],
)
def test_a_template_that_cannot_be_applied_fails_the_task(
    tasks: dict, tmp_path: Path, template: str, says: str
) -> None:
    place = Place(tmp_path)
    (place.folder / "chat_template.jinja").write_text(template)
    place.describe()
    session = place.session({"choice": tasks["choice"]}, apply_chat_template=True)
    with pytest.raises(TaskFailure, match=f"chat template cannot be applied: {says}"):
        session.prepared("choice")


def test_an_end_of_thinking_that_is_no_token(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.describe()
    with pytest.raises(AtlasError, match="think_end_token: 300 found, and its tokens are 0 to 299"):
        place.session({}, think_end_token=300)


def lacking(folder: Path, *tokens: str, model: bool = False) -> None:
    """Take special tokens from a tokenizer, and from the model's own configuration too."""
    files = {"tokenizer_config.json": [f"{token}_token" for token in tokens]}
    if model:
        ids = [f"{token}_token_id" for token in tokens]
        files |= {"config.json": ids, "generation_config.json": ids}
    for name, keys in files.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **dict.fromkeys(keys)}))


@pytest.mark.parametrize("tokens", [("eos",), ("bos", "eos"), ("pad", "bos", "eos")])
def test_the_model_s_own_ids_where_the_tokenizer_has_none(
    places: dict, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: tuple
) -> None:
    place = Place(tmp_path)
    whole = place.session(tasks)
    plain = plainly(whole, list(tasks), Path(tasks["choice"]["include"]), 4)
    lacking(place.folder, *tokens)
    place.describe()
    session = place.session(tasks)
    assert session.lm.tokenizer.eos_token is None
    outcomes = through_atlas(session, None, tmp_path / "dense", monkeypatch)
    assert_same_prompts(merged(outcomes), plain)


def test_where_nobody_has_ids_only_what_needs_one_fails(tasks: dict, tmp_path: Path) -> None:
    place = Place(tmp_path)
    lacking(place.folder, "pad", "bos", "eos", model=True)
    place.describe()
    alone = write_task(tmp_path, "alone", choice_documents(2), **CHOICE | {"doc_to_text": ""})
    result = evaluate_node(place.session({**tasks, "alone": alone}), None, tmp_path / "dense")
    for name, task in result["tasks"].items():
        assert task["status"] == ("failed" if name in ("rolling", "alone") else "ok")
        if task["status"] == "failed":
            assert f"'{name}', document 0: its first token is predicted from BOS" in task["reason"]
    assert result["run"]["prefix_token"] is None
    assert result["tasks"]["words"]["tokens"]["generation"] > 0


@pytest.mark.parametrize(
    ("text", "option", "reason"),
    [
        ("the hou", "se", "document 1: nothing to score: 'se' comes to no token of its own"),
        ("the hou", "", "document 1: nothing to score: '' comes to no token"),
        (" ", "t", "document 1: the context ' ' comes to no token"),
        ("", "", "document 1: nothing to score: the continuation '' comes to no token"),
    ],
)
def test_a_request_with_nothing_to_score_or_to_follow(
    places: dict, tmp_path: Path, text: str, option: str, reason: str
) -> None:
    good = {"context": "the old", "choices": [" cat", " bird"], "label": 0}
    bad = {"context": text, "choices": [option, "bird"], "label": 0}
    changed = CHOICE | {"target_delimiter": ""}
    entries = {"bad": write_task(tmp_path, "bad", [good, bad], **changed)}
    result = evaluate_node(places[False].session(entries), None, tmp_path / "dense")
    assert result["tasks"]["bad"]["status"] == "failed"
    assert reason in result["tasks"]["bad"]["reason"]
