"""One node: what is kept, continued and run anew."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from interruptions import Interrupted, products, watch
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import evaluate as evaluation
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.lm import journalled
from sparsity_atlas.lm.journalled import Early
from sparsity_atlas.lm.model import AtlasLM
from sparsity_atlas.loading import free_memory
from sparsity_atlas.tasks.loaded import LoadedTask
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    letter_documents,
    open_session,
    rolling_documents,
    save_model,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NODE = Node.make({"rule": "topp"}, "intermediate", "0.8")


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Three tasks of several batches each."""
    folder = tmp_path / "tasks"
    return {
        "choice": write_task(folder, "choice", choice_documents(40), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(), **ROLLING),
        "words": write_task(folder, "words", rolling_documents(9, 4), **GENERATION),
    }


def evaluate(
    manifest: Path, tasks: dict, folder: Path, node: Node | None = NODE, **changes: Any
) -> list[str]:
    """Evaluate in a new session, as a new process does; the batches that were computed."""
    session = open_session(manifest, tasks, **changes)
    calls = watch(session)
    evaluate_node(session, node, folder)
    return calls


def test_interrupted_and_resumed(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    whole = evaluate(manifest, tasks, tmp_path / "whole")
    assert whole.count("score") > 8
    assert whole.count("generate") == 3
    for stop in range(0, len(whole), 2):
        folder = tmp_path / f"stopped-{stop}"
        session = open_session(manifest, tasks)
        done = watch(session, stop)
        with pytest.raises(Interrupted):
            evaluate_node(session, NODE, folder)
        assert len(done) == stop
        assert not (folder / "eval.json").exists()
        assert evaluate(manifest, tasks, folder) == whole[stop:]
        assert products(folder) == products(tmp_path / "whole")
    assert sorted(products(tmp_path / "whole")) == [".lock", "eval.json", "samples.parquet"]


def test_a_batch_that_is_begun_early_changes_nothing(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(manifest, tasks, tmp_path / "whole")
    # As on a GPU.
    monkeypatch.setattr(journalled, "AHEAD", {"cpu": 1})
    assert evaluate(manifest, tasks, tmp_path / "ahead") == whole
    assert products(tmp_path / "ahead") == products(tmp_path / "whole")
    for stop in (1, 3, 7):
        folder = tmp_path / f"stopped-{stop}"
        session = open_session(manifest, tasks)
        watch(session, stop)
        with pytest.raises(Interrupted):
            evaluate_node(session, NODE, folder)
        # The one in front was begun, and nobody has read it.
        assert evaluate(manifest, tasks, folder) in (whole[stop - 1 :], whole[stop:])
        assert products(folder) == products(tmp_path / "whole")


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks whose first batch is begun before the one in front of them has ended, as on a GPU."""
    monkeypatch.setattr(journalled, "AHEAD", {"cpu": 1})
    found: list[str] = []
    begin = AtlasLM._begin_following

    def beginning(self: AtlasLM) -> Early | None:
        one = begin(self)
        found.extend(one.work.documents[0][:1] if one is not None else ())
        return one

    monkeypatch.setattr(AtlasLM, "_begin_following", beginning)
    return found


def scored(folder: Path) -> dict[str, dict[str, Any]]:
    """Tasks without code of their own, two with a mask and two without."""
    return {
        "choice": write_task(folder, "choice", choice_documents(40), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(), **ROLLING),
        "others": write_task(folder, "others", choice_documents(24), **CHOICE),
        "last": write_task(folder, "last", rolling_documents(9, 4), **ROLLING),
    }


@pytest.mark.parametrize("node", [None, NODE], ids=["dense", "sparse"])
def test_the_next_task_is_begun_before_one_has_ended(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    early: list[str],
    node: Node | None,
) -> None:
    tasks = scored(tmp_path / "tasks")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journalled, "AHEAD", {})
        whole = evaluate(manifest, tasks, tmp_path / "whole", node)
    assert sorted(evaluate(manifest, tasks, tmp_path / "early", node)) == sorted(whole)
    # All requests and what the model does right are known from the first run.
    assert early == ["pages", "others", "last"]
    assert products(tmp_path / "early") == products(tmp_path / "whole")


def test_what_is_not_ready_waits_for_its_turn(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: list[str]
) -> None:
    """Requests to be built, texts to be generated, code of a task, sharing that is not proved, a journal."""
    # As where other processes build them: else all are built before the first pass.
    monkeypatch.setattr(evaluation._Turns, "not_seen_to_fit", lambda self: [])
    tasks = scored(tmp_path / "tasks")
    first = tasks.pop("choice")
    words = write_task(tmp_path / "tasks", "words", rolling_documents(9, 4), **GENERATION)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evaluate(manifest, {"choice": first, **tasks, "words": words}, tmp_path / "unknown")
    assert early == []
    evaluate(manifest, {"choice": first, "words": words}, tmp_path / "texts")
    assert early == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedTask, "may_change", lambda *_: True)
        evaluate(manifest, {"choice": first, **tasks}, tmp_path / "code")
    assert early == []
    for path in (tmp_path / "cache").rglob("abilities/*"):
        path.unlink()
    evaluate(manifest, {"pages": tasks["pages"], "choice": first}, tmp_path / "unproved")
    assert early == []
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/pages.journal").touch()
    evaluate(manifest, {"choice": first, "pages": tasks["pages"]}, tmp_path / "begun")
    assert early == []
    evaluate(manifest, {"choice": first, "pages": tasks["pages"]}, tmp_path / "ready")
    assert early == ["pages"]


def test_what_was_begun_for_another_level_is_not_taken(
    manifest: Path, tmp_path: Path, early: list[str]
) -> None:
    tasks = scored(tmp_path / "tasks")
    other = Node.make({"rule": "topp"}, "intermediate", "0.5")
    evaluate(manifest, tasks, tmp_path / "whole", other)
    session = open_session(manifest, tasks)
    early.clear()
    begin = AtlasLM._begin_following

    def stopping(self: AtlasLM) -> None:
        self._early = begin(self)
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtlasLM, "_begin_following", stopping)
        with pytest.raises(Interrupted):
            evaluate_node(session, NODE, tmp_path / "stopped")
    assert early == ["pages"]
    evaluate_node(session, other, tmp_path / "after")
    assert products(tmp_path / "after") == products(tmp_path / "whole")


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_finished_task_is_kept_in_its_journal_or_in_the_table(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(evaluation, "WRITE_SECONDS", seconds)
    whole = evaluate(manifest, tasks, tmp_path / "whole")
    first = whole.index("generate") - 1
    session = open_session(manifest, tasks)
    watch(session, first)
    with pytest.raises(Interrupted):
        evaluate_node(session, NODE, tmp_path / "cut")
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert ("samples.parquet" in names) == (seconds == 0)
    assert ("choice.journal" in names) == (seconds > 0)
    assert evaluate(manifest, tasks, tmp_path / "cut") == whole[first:]
    assert products(tmp_path / "cut") == products(tmp_path / "whole")


def test_what_does_not_fit_leaves_no_result(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, folder = open_session(manifest, tasks), tmp_path / "node"
    limit = [2**20]
    monkeypatch.setattr(free_memory, "host_limit", lambda: (limit[0], "this job was given"))
    with pytest.raises(
        AtlasError, match=r"'pages': batches of \d+ tokens: needs about .*; no batch_size"
    ):
        evaluate_node(session, NODE, folder)
    assert not (folder / "eval.json").exists()
    limit[0] = 2**40
    found = evaluate_node(session, NODE, folder)
    assert found["status"] == "ok"
    largest = {name: task["largest"] for name, task in found["tasks"].items()}
    # Four windows of the model's whole length, all of which is scored; no mask.
    assert largest["pages"] == {"tokens": 192, "longest": 48, "scored": 192, "pairs": 0, "kept": 0}
    assert largest["choice"]["pairs"] > largest["choice"]["tokens"] > largest["choice"]["scored"]
    assert largest["words"]["scored"] == 4
    assert largest["words"]["tokens"] <= largest["words"]["kept"] <= 4 * 48


@pytest.mark.parametrize("node", [None, NODE], ids=["dense", "sparse"])
def test_a_last_task_that_does_not_fit_is_known_before_the_first_runs(
    manifest: Path,
    tasks: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    node: Node | None,
) -> None:
    """And with the setting that is named all of them run."""
    # The largest comes last, by far.
    names = ("words", "choice", "pages")
    tasks = {name: tasks[name] for name in names}
    settings = {"batch_size": 16, "max_length": 48}
    needs: dict[str, int] = {}

    def noted(device: Any, needed: Any, what: str, _: Any) -> None:
        needs[what.split("'")[1]] = needed(1.0)

    with monkeypatch.context() as patch:
        check, looks = AtlasLM._check_room, []

        def each(self: AtlasLM, works: Any, counter: Any) -> None:
            looks.append(len(works))
            for one in works:
                self._fits = 0
                check(self, [one], counter)

        patch.setattr(free_memory, "check", noted)
        patch.setattr(AtlasLM, "_check_room", each)
        whole = evaluate(manifest, tasks, tmp_path / "whole", node, **settings)
    assert looks == [3, 1, 1]
    assert needs["pages"] > 1.5 * max(needs["words"], needs["choice"])
    room = max(needs["words"], needs["choice"])
    monkeypatch.setattr(free_memory, "free", lambda _: (room, room, "this job was given"))
    session = open_session(manifest, tasks, **settings)
    calls = watch(session)
    with pytest.raises(AtlasError, match=r"^'pages': .*; batch_size: \d+ would fit$") as refusal:
        evaluate_node(session, node, tmp_path / "node")
    assert calls == []
    fitting = int(str(refusal.value).split()[-3])
    assert fitting < 16
    evaluate(manifest, tasks, tmp_path / "node", node, **{**settings, "batch_size": fitting})
    assert (tmp_path / "node/eval.json").exists()
    # A level whose tasks are all kept asks for no room.
    assert whole
    assert evaluate(manifest, tasks, tmp_path / "whole", node, **settings) == []


def test_what_earlier_passes_left_to_the_allocator_is_no_reason_to_refuse(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at a real limit: the second task was refused beside the heap of the first."""
    rooms = iter([2**40])  # looked at once, for all tasks and levels
    monkeypatch.setattr(free_memory, "free", lambda _: (next(rooms), 2**40, "this job was given"))
    session = open_session(manifest, tasks)
    for level in ("0.8", "0.5"):
        node = Node.make({"rule": "topp"}, "intermediate", level)
        assert evaluate_node(session, node, tmp_path / level)["status"] == "ok"


def test_interrupted_in_a_record(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    whole = evaluate(manifest, tasks, tmp_path / "whole")
    session = open_session(manifest, tasks)
    watch(session, 4)
    with pytest.raises(Interrupted):
        evaluate_node(session, NODE, tmp_path / "cut")
    journal = tmp_path / "cut" / "choice.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert evaluate(manifest, tasks, tmp_path / "cut") == whole[3:]
    assert products(tmp_path / "cut") == products(tmp_path / "whole")


def test_nodes_of_a_session_do_not_see_each_other(
    manifest: Path, tasks: dict, tmp_path: Path
) -> None:
    session = open_session(manifest, tasks)
    other = Node.make({"rule": "topk"}, "all_inputs", "0.3")
    for name, node in {"first": NODE, "other": other, "again": NODE, "dense": None}.items():
        evaluate_node(session, node, tmp_path / name)
    evaluate(manifest, tasks, tmp_path / "alone", None)
    assert products(tmp_path / "again") == products(tmp_path / "first")
    assert products(tmp_path / "dense") == products(tmp_path / "alone")
    assert products(tmp_path / "other") != products(tmp_path / "first")


def test_asked_for_again_nothing_runs(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    evaluate(manifest, tasks, tmp_path / "node")
    before = products(tmp_path / "node")
    assert evaluate(manifest, tasks, tmp_path / "node") == []
    assert products(tmp_path / "node") == before


def test_a_task_added_runs_alone(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    two = {name: tasks[name] for name in ("pages", "words")}
    whole = evaluate(manifest, tasks, tmp_path / "whole")
    first = evaluate(manifest, two, tmp_path / "grown")
    second = evaluate(manifest, tasks, tmp_path / "grown")
    assert whole == [*second, *first]
    assert products(tmp_path / "grown") == products(tmp_path / "whole")
    # And taken away again, it costs nothing either way.
    assert evaluate(manifest, two, tmp_path / "grown") == []
    assert list(json.loads((tmp_path / "grown" / "eval.json").read_text())["tasks"]) == list(two)
    assert evaluate(manifest, tasks, tmp_path / "grown") == []


def test_an_edited_data_file_is_run_anew(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    evaluate(manifest, tasks, tmp_path / "node")
    before = read_table(tmp_path / "node" / "samples.parquet")[1].to_pylist()
    documents = choice_documents(40)
    documents[3]["label"] = (documents[3]["label"] + 1) % len(documents[3]["choices"])
    write_task(tmp_path / "tasks", "choice", documents, **CHOICE)
    calls = evaluate(manifest, tasks, tmp_path / "node")
    assert set(calls) == {"score"}
    after = read_table(tmp_path / "node" / "samples.parquet")[1].to_pylist()
    assert [one["doc_id"] for one, two in zip(before, after, strict=True) if one != two] == [3]


def test_a_task_that_gets_documents_is_run_alone(
    manifest: Path, tasks: dict, tmp_path: Path
) -> None:
    whole = evaluate(manifest, tasks, tmp_path / "whole")
    write_task(tmp_path / "tasks", "choice", [], **CHOICE)
    others = evaluate(manifest, tasks, tmp_path / "node")
    found = json.loads((tmp_path / "node" / "eval.json").read_text())["tasks"]
    assert [one["status"] for one in found.values()] == ["failed", "ok", "ok"]
    # Until then it is a result, like the others.
    assert evaluate(manifest, tasks, tmp_path / "node") == []
    write_task(tmp_path / "tasks", "choice", choice_documents(40), **CHOICE)
    assert [*evaluate(manifest, tasks, tmp_path / "node"), *others] == whole
    assert products(tmp_path / "node") == products(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"doc_to_text": "{{context}}!"}, True),
        ({"num_fewshot": 1, "fewshot_split": "test"}, True),
        ({"metric_list": [{"metric": "acc"}]}, True),
        ({"metadata": {"version": 2}}, False),
    ],
)
def test_an_edited_task_is_run_anew(
    manifest: Path, tasks: dict, tmp_path: Path, changed: dict, again: bool
) -> None:
    one = {"choice": tasks["choice"]}
    evaluate(manifest, one, tmp_path / "node")
    write_task(tmp_path / "tasks", "choice", choice_documents(40), **{**CHOICE, **changed})
    assert bool(evaluate(manifest, one, tmp_path / "node")) == again


def test_an_interrupted_task_that_was_edited_is_run_anew(
    manifest: Path, tasks: dict, tmp_path: Path
) -> None:
    session = open_session(manifest, {"choice": tasks["choice"]})
    watch(session, 3)
    with pytest.raises(Interrupted):
        evaluate_node(session, NODE, tmp_path / "node")
    write_task(tmp_path / "tasks", "choice", choice_documents(40, seed=9), **CHOICE)
    whole = evaluate(manifest, {"choice": tasks["choice"]}, tmp_path / "whole")
    assert evaluate(manifest, {"choice": tasks["choice"]}, tmp_path / "node") == whole
    assert products(tmp_path / "node") == products(tmp_path / "whole")


@pytest.fixture(scope="module")
def work(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, int]:
    """A folder with a node that is done and one that is half done, their task, and its number of batches."""
    folder = tmp_path_factory.mktemp("work")
    one = {"choice": write_task(folder / "tasks", "choice", choice_documents(40), **CHOICE)}
    whole = evaluate(manifest, one, folder / "node")
    session = open_session(manifest, one)
    watch(session, 2)
    with pytest.raises(Interrupted):
        evaluate_node(session, NODE, folder / "half")
    return folder, one, len(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3},
        {"seed": 1},
        {"max_length": 30},
        {"add_bos_token": True},
        {"lm_eval_prefix": True},
        {"system_instruction": "Be brief."},
        {"gen_kwargs": {"max_gen_toks": 3}},
        {"think_end_token": "</think>"},
        {"dtype": "bfloat16"},
        {"code": "edited"},
        {"node": None},
        {"node": Node.make({"rule": "topp"}, "intermediate", "0.81")},
        {"node": Node.make({"rule": "topp", "power": 2}, "intermediate", "0.8")},
        {"node": Node.make({"rule": "topk"}, "intermediate", "0.8")},
        {"node": Node.make({"rule": "topp"}, "up", "0.8")},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_other_work_is_never_reused(
    manifest: Path, work: tuple[Path, dict, int], tmp_path: Path, changes: dict
) -> None:
    folder, one, batches = work
    shutil.copytree(folder, tmp_path / "work")
    # Half done as well as done: a journal of other work is no help either.
    for name in ("node", "half"):
        calls = evaluate(manifest, one, tmp_path / "work" / name, **changes)
        assert len(calls) >= batches * 4 // changes.get("batch_size", 4)


def test_the_same_work_is_reused(
    manifest: Path, work: tuple[Path, dict, int], tmp_path: Path
) -> None:
    folder, one, batches = work
    shutil.copytree(folder, tmp_path / "work")
    assert evaluate(manifest, one, tmp_path / "work/node") == []
    assert len(evaluate(manifest, one, tmp_path / "work/half")) == batches - 2


def test_other_weights_are_never_reused(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    one = {"choice": tasks["choice"]}
    whole = evaluate(manifest, one, tmp_path / "node")
    folder = save_model(tmp_path / "other", seed=1)
    path = write_model_manifest(folder, tmp_path / "other.json")
    assert evaluate(path, one, tmp_path / "node") == whole
    with torch.no_grad():
        save_model(folder, seed=2)
    with pytest.raises(AtlasError, match="changed since"):
        open_session(path, one)


def test_no_result_tells_where_or_when_it_was_made(
    manifest: Path, tasks: dict, tmp_path: Path
) -> None:
    evaluate(manifest, tasks, tmp_path / "node")
    manifest_text = (tmp_path / "node" / "eval.json").read_text()
    header, table = read_table(tmp_path / "node" / "samples.parquet")
    for text in (manifest_text, json.dumps(header), json.dumps(table.to_pylist(), default=str)):
        assert str(tmp_path) not in text
        assert str(manifest.parent) not in text
        assert socket.gethostname() not in text
        assert not re.search(r"20\d\d-\d\d-\d\d", text)


def test_results_do_not_depend_on_the_folder(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    evaluate(manifest, tasks, tmp_path / "node")
    elsewhere = tmp_path / "elsewhere"
    moved = {
        "choice": write_task(elsewhere, "choice", choice_documents(40), **CHOICE),
        "pages": write_task(elsewhere, "pages", rolling_documents(), **ROLLING),
        "words": write_task(elsewhere, "words", rolling_documents(9, 4), **GENERATION),
    }
    assert evaluate(manifest, moved, tmp_path / "node") == []


def test_clusters(manifest: Path, tmp_path: Path) -> None:
    documents = [{**one, "kind": f"k{i % 3}"} for i, one in enumerate(letter_documents())]
    entry = write_task(tmp_path / "tasks", "letters", documents, **CHOICE)
    evaluate(manifest, {"letters": {**entry, "cluster": "kind", "limit": 4}}, tmp_path / "node")
    rows = read_table(tmp_path / "node" / "samples.parquet")[1].to_pylist()
    assert [row["cluster"] for row in rows] == ["k0", "k1", "k2", "k0"]
    evaluate(manifest, {"letters": {**entry, "cluster": "colour"}}, tmp_path / "other")
    found = json.loads((tmp_path / "other" / "eval.json").read_text())["tasks"]["letters"]
    assert found["reason"].startswith("cluster: documents have no field 'colour'; they have")


def test_a_site_that_the_model_does_not_have(tasks: dict, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tiny_lm import tiny_tokenizer

    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=24, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    path = write_model_manifest(tmp_path / "gpt2", tmp_path / "model.json")
    node = Node.make({"rule": "topp"}, "gate", "0.8")
    with pytest.raises(AtlasError, match=r"no site 'gate'.*it has"):
        evaluate(path, {"choice": tasks["choice"]}, tmp_path / "node", node)
    dense = open_session(path, {"choice": tasks["choice"]})
    result = evaluate_node(dense, None, tmp_path / "dense")
    counted = set(result["tasks"]["choice"]["sparsity"])
    assert counted == {"qkv_input", "o_input", "input", "intermediate"}


def test_a_chat_template_that_is_not_there(manifest: Path, tasks: dict) -> None:
    with pytest.raises(AtlasError, match="found none"):
        open_session(manifest, tasks, apply_chat_template=True)


def test_a_mask_of_another_kind(tmp_path: Path) -> None:
    text = (
        "from sparsity_atlas.criteria.built_in.topk import TopK\n\n\nclass Soft(TopK):\n"
        "    def mask(self, values, level):\n        return values.abs().sigmoid()\n"
    )
    (tmp_path / "soft.py").write_text(text)
    with pytest.raises(
        AtlasError, match=r"Soft\.mask at level 0: expected torch\.bool .*found torch\.float32"
    ):
        Node.make({"file": str(tmp_path / "soft.py")}, "up", "0.5")


def test_damaged_samples_are_named(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    evaluate(manifest, tasks, tmp_path / "node")
    path = tmp_path / "node" / "samples.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(AtlasError, match=r"samples\.parquet: damaged table"):
        evaluate(manifest, tasks, tmp_path / "node")


@pytest.mark.parametrize("node", [None, NODE])
def test_it_says_how_much_is_done(
    manifest: Path, tasks: dict, tmp_path: Path, node: Node | None
) -> None:
    said: list[float] = []
    session = open_session(manifest, tasks)
    evaluate_node(session, node, tmp_path / "node", told=said.append)
    batches = sum(len(session.prepared(name).work.positions) for name in tasks)
    assert len(said) == batches
    assert said == sorted(said)
    assert said[0] < 0.2
    assert said[-1] == pytest.approx(1.0)


def test_what_was_done_before_an_interruption_is_not_said_again(
    manifest: Path, tasks: dict, tmp_path: Path
) -> None:
    said: list[float] = []

    def stop(share: float) -> None:
        said.append(share)
        if share > 0.4:
            raise Interrupted

    with pytest.raises(Interrupted):
        evaluate_node(open_session(manifest, tasks), NODE, tmp_path / "node", told=stop)
    said.clear()
    session = open_session(manifest, tasks)
    batches = watch(session)
    evaluate_node(session, NODE, tmp_path / "node", told=said.append)
    assert len(said) == len(batches)
    assert said == sorted(said)
    assert said[-1] == pytest.approx(1.0)
