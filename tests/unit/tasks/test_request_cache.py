"""Tokenised requests on disk: found by whom they fit, and by nobody else."""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import Task

from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.files.kept_bytes import UNUSED_DAYS
from sparsity_atlas.lm import forest
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.lm.model import AtlasLM
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load_tokenizer
from sparsity_atlas.tasks import request_cache
from tiny_lm import (
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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparsity-atlas" / "requests"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks whose requests were built."""
    names: list[str] = []
    original = Task.build_all_requests

    def build(self: Task, **options: Any) -> None:
        names.append(self.task_name)
        original(self, **options)

    monkeypatch.setattr(Task, "build_all_requests", build)
    return names


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """One task of each kind."""
    folder = tmp_path / "tasks"
    shots = {"fewshot_split": "test", "num_fewshot": 2, "fewshot_config": {"sampler": "default"}}
    return {
        "choice": write_task(folder, "choice", choice_documents(), **CHOICE),
        "shots": write_task(folder, "shots", choice_documents(6, 3), **CHOICE, **shots),
        "pages": write_task(folder, "pages", rolling_documents(), **ROLLING),
        "last": write_task(folder, "last", rolling_documents(5, 3), **LAST_WORD),
        "words": write_task(folder, "words", rolling_documents(5, 4), **GENERATION),
    }


def test_another_process_builds_nothing_and_finds_the_same(
    manifest: Path, tasks: dict, built: list[str], tmp_path: Path
) -> None:
    first = evaluate_node(open_session(manifest, tasks), None, tmp_path / "first")
    assert built == list(tasks)
    second = evaluate_node(open_session(manifest, tasks), None, tmp_path / "second")
    assert built == list(tasks)
    assert first == second
    samples = [tmp_path / name / "samples.parquet" for name in ("first", "second")]
    assert samples[0].read_bytes() == samples[1].read_bytes()


def test_a_session_builds_once(
    manifest: Path, tasks: dict, built: list[str], tmp_path: Path
) -> None:
    session = open_session(manifest, tasks)
    session.prepared("choice")
    request_cache_files = list(tmp_path.rglob("requests/*"))
    for file in request_cache_files:
        file.unlink()
    evaluate_node(session, None, tmp_path / "first")
    evaluate_node(session, None, tmp_path / "second")
    assert sorted(built) == sorted(tasks)


def test_another_model_with_the_same_tokenizer_shares(
    manifest: Path, tasks: dict, built: list[str], tmp_path: Path
) -> None:
    open_session(manifest, tasks).prepared("choice")
    other = save_model(tmp_path / "other", seed=5, num_hidden_layers=3)
    path = write_model_manifest(other, tmp_path / "other.json")
    open_session(path, tasks).prepared("choice")
    assert built == ["choice"]


def test_the_length_of_the_context_changes_no_request(
    manifest: Path, tasks: dict, built: list[str], tmp_path: Path
) -> None:
    """Requests are cut when they are run, so that models with other limits share them."""
    evaluate_node(open_session(manifest, tasks), None, tmp_path / "long")
    shared = evaluate_node(open_session(manifest, tasks, max_length=40), None, tmp_path / "shared")
    assert built == list(tasks)
    for file in tmp_path.rglob("requests/*"):
        file.unlink()
    fresh = evaluate_node(open_session(manifest, tasks, max_length=40), None, tmp_path / "fresh")
    assert built == list(tasks) * 2
    assert shared == fresh


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether rows might branch, of each time that requests of a task were arranged."""
    found: list[bool] = []
    original = forest.pack

    def pack(requests: list[forest.Request], *arguments: Any, share: bool, **options: Any) -> Any:
        if len(requests) > 10:  # proofs of sharing arrange a few of their own
            found.append(share)
        return original(requests, *arguments, share=share, **options)

    monkeypatch.setattr(forest, "pack", pack)
    return found


def test_batches_are_arranged_once_for_models_of_the_same_limits(
    manifest: Path, tasks: dict, packed: list[bool], tmp_path: Path
) -> None:
    def work(**settings: Any) -> Any:
        return (
            open_session(manifest, {"choice": tasks["choice"]}, **settings).prepared("choice").work
        )

    first = work()
    again = work()
    assert packed == [True]
    for one, other in zip(
        first.batches["loglikelihood"], again.batches["loglikelihood"], strict=True
    ):
        assert repr(one) == repr(other)
    assert {**vars(first), "batches": None} == {**vars(again), "batches": None}
    work(batch_size=3)
    work(max_length=40)
    assert packed == [True] * 3
    for file in tmp_path.rglob("batches/*"):
        file.write_bytes(file.read_bytes()[:-1])
    assert repr(work()) == repr(first)
    assert packed == [True] * 4


def test_a_model_that_cannot_share_gets_batches_of_its_own(
    manifest: Path, tasks: dict, packed: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    choice = {"choice": tasks["choice"]}
    open_session(manifest, choice).prepared("choice")
    monkeypatch.setattr(AtlasLM, "_abilities", lambda *_: Abilities())
    kept = [open_session(manifest, choice).prepared("choice").work for _ in range(2)]
    assert packed == [True, False]
    for file in tmp_path.rglob("batches/*"):
        file.unlink()
    monkeypatch.setattr(request_cache, "Beside", lambda _: None)
    fresh = open_session(manifest, choice).prepared("choice").work
    assert packed == [True, False, True, False]
    assert repr(kept[0]) == repr(kept[1]) == repr(fresh)


def other_tokenizer(tasks: dict, folder: Path) -> tuple[dict, dict, Path | None]:
    model = save_model(folder / "model", bos=True)
    return tasks, {}, write_model_manifest(model, folder / "model.json")


def tokenizer_says(**changes: Any) -> Any:
    def change(tasks: dict, folder: Path) -> tuple[dict, dict, Path | None]:
        model = save_model(folder / "model")
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return tasks, {}, write_model_manifest(model, folder / "model.json")

    return change


def edited_data(tasks: dict, folder: Path) -> tuple[dict, dict, Path | None]:
    documents = choice_documents()
    documents[0]["choices"][0] += " bird"
    return {"choice": write_task(folder / "tasks", "choice", documents, **CHOICE)}, {}, None


def edited_task(tasks: dict, folder: Path) -> tuple[dict, dict, Path | None]:
    changed = CHOICE | {"doc_to_text": "{{context}}!"}
    return (
        {"choice": write_task(folder / "tasks", "choice", choice_documents(), **changed)},
        {},
        None,
    )


def fewer(tasks: dict, folder: Path) -> tuple[dict, dict, Path | None]:
    return {"choice": tasks["choice"] | {"limit": 3}}, {}, None


def other_settings(**changes: Any) -> Any:
    return lambda tasks, folder: (tasks, changes, None)


@pytest.mark.parametrize(
    "change",
    [
        other_tokenizer,
        tokenizer_says(split_special_tokens=True),
        edited_data,
        edited_task,
        fewer,
        other_settings(seed=7),
        other_settings(add_bos_token=True),
        other_settings(lm_eval_prefix=True),
        other_settings(system_instruction="Be brief."),
        other_settings(gen_kwargs={"max_gen_toks": 3}),
    ],
)
def test_what_does_not_fit_is_built_anew(
    manifest: Path, tasks: dict, built: list[str], tmp_path: Path, change: Any
) -> None:
    open_session(manifest, tasks).prepared("choice")
    changed, settings, path = change(tasks, tmp_path)
    open_session(path or manifest, changed, **settings).prepared("choice")
    assert built == ["choice"] * 2


def test_the_chat_template_counts(tasks: dict, built: list[str], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", chat=True)
    path = write_model_manifest(folder, tmp_path / "model.json")
    for chat in (False, True):
        open_session(path, tasks, apply_chat_template=chat).prepared("choice")
    assert built == ["choice"] * 2


CODE = """
from transformers import PreTrainedTokenizerFast
class Mine(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *arguments, **options):
        return super()._encode_plus("SIGN" + text, *arguments, **options)
"""


def test_a_tokenizer_with_code_of_its_own(tmp_path: Path) -> None:
    """What its code does nobody knows; an edit of it must not find the requests of before."""
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(CODE)
    tokenizer = load_tokenizer(Checkpoint(folder, trust_remote_code=True))
    assert type(tokenizer).__name__ == "Mine"
    assert request_cache.tokenizer_digest(tokenizer) is None


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_task(path: Path) -> None:
    """A whole file, under a name that is not its own."""
    (other,) = (one for one in path.parent.iterdir() if one != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [cut_short, one_bit, emptied, of_another_task])
def test_a_damaged_file_is_never_used(
    manifest: Path, tasks: dict, built: list[str], cache: Path, damage: Any
) -> None:
    open_session(manifest, tasks).prepared("choice")
    (path,) = cache.iterdir()
    open_session(manifest, tasks).prepared("last")
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole
    open_session(manifest, tasks).prepared("choice")
    assert built == ["choice", "last", "choice"]
    assert path.read_bytes() == whole


def test_what_nobody_used_for_long_goes(manifest: Path, tasks: dict, cache: Path) -> None:
    for name in ("choice", "last"):
        open_session(manifest, tasks).prepared(name)
    old, young = sorted(cache.iterdir())
    month = time.time() - (UNUSED_DAYS + 1) * 24 * 3600
    os.utime(old, (month, month))
    open_session(manifest, tasks).prepared("words")
    assert not old.exists()
    assert young.exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    manifest: Path, tasks: dict, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level("INFO", "sparsity_atlas"):
        session: Session = open_session(manifest, tasks)
        assert session.prepared("choice").work.batches
    assert "tokenised requests are not kept" in caplog.text


def test_labels_are_read_with_the_requests(
    manifest: Path, tasks: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_session(manifest, tasks).prepared("choice")
    for name in ("_hash", "grouped", "mislabelled"):
        monkeypatch.delattr(f"sparsity_atlas.tasks.prepared.{name}")
    second = open_session(manifest, tasks).prepared("choice")
    for name in ("hashes", "clusters", "chance", "mislabelled"):
        assert getattr(first, name) == getattr(second, name)


def test_documents_that_code_of_the_task_changes_are_read_anew(
    manifest: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    tasks = {"own": write_task(folder, "own", choice_documents(), **CHOICE)}
    (folder / "own_u.py").write_text(
        "def f(doc):\n    doc['context'] += '!'\n    return doc['label']\n"
    )
    with (folder / "own.yaml").open("a") as file:
        file.write("doc_to_target: !function own_u.f\n")
    contexts = [one["context"] for one in choice_documents()]
    for _ in range(2):  # built, and read
        session = open_session(manifest, tasks)
        for share in (True, False):
            prepared = session.prepared("own", share=share)
            (leaf,) = prepared.leaves.values()
            assert [one["context"] for one in leaf.documents] == contexts
            assert prepared.mislabelled == 0
            leaf.doc_to_target(leaf.documents[0])  # as a scoring may
            assert leaf.documents[0]["context"] == contexts[0] + "!"


def test_what_was_built_is_not_searched_for_garbage_before_the_next_session(
    manifest: Path, tasks: dict
) -> None:
    session = open_session(manifest, tasks)
    assert gc.get_freeze_count() == 0
    session.prepared("choice")
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    open_session(manifest, tasks)
    assert gc.get_freeze_count() == 0
