"""A masked-diffusion model on lm-eval's tasks: as by hand, in any batch, broken off and resumed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interruptions import Interrupted, products
from masked_diffusion import MASK, logits_by_hand, save_diffusion
from sparsity_atlas.diffusion.mask_sets import mask_sets
from sparsity_atlas.diffusion.rows import Request
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.files.whole import digest
from sparsity_atlas.lm import journalled
from sparsity_atlas.lm.masked import masked_lm
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    ROLLING,
    choice_documents,
    letter_documents,
    open_session,
    rolling_documents,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NODE = Node.make({"rule": "topp"}, "intermediate", "0.8")
SAMPLES = 7  # all sets of three tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion") / "m")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Path:
    return write_model_manifest(folder, folder.parent / "model.json")


@pytest.fixture(scope="module")
def tasks(folder: Path) -> dict[str, dict[str, Any]]:
    at = folder.parent / "tasks"
    generation = {**GENERATION["generation_kwargs"], "max_gen_toks": 6, "block_length": 3}
    return {
        "choice": write_task(at, "choice", choice_documents(6), **CHOICE),
        "letters": write_task(at, "letters", letter_documents(4), **CHOICE),
        "pages": write_task(at, "pages", rolling_documents(2), **ROLLING),
        "last": write_task(at, "last", rolling_documents(5, 3), **LAST_WORD),
        "words": write_task(
            at,
            "words",
            rolling_documents(5, 4),
            **{**GENERATION, "generation_kwargs": generation},
        ),
    }


def session_of(manifest: Path, tasks: dict, *names: str, **changes: Any) -> Session:
    settings = {"samples": SAMPLES, **changes.pop("diffusion", {})}
    own = {name: tasks[name] for name in names or tasks}
    return open_session(manifest, own, diffusion=settings, **changes)


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    _, table = read_table(folder / "samples.parquet")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["task"], []).append(row)
    return found


def bound_by_hand(
    logits: Callable[[Tensor], Tensor], prompt: list[int], answer: list[int], beside: list[int]
) -> float:
    """All sets of masked tokens, or those that are drawn for the first of the options of this length."""
    seed = digest({"prompt": prompt, "answer": beside})
    if 2 ** len(answer) - 1 <= SAMPLES:
        every = itertools.product([False, True], repeat=len(answer))
        sets = [(np.array(one), None) for one in every if any(one)]
    else:
        drawn = mask_sets(len(answer), SAMPLES, seed)
        sets = list(zip(drawn.masked, drawn.weights, strict=True))
    total = 0.0
    for masked, weight in sets:
        count = int(masked.sum())
        weight = weight or 1 / (count * math.comb(len(answer), count))
        ids = torch.tensor([*prompt, *answer])
        places = len(prompt) + torch.from_numpy(np.flatnonzero(masked))
        targets = ids[places].clone()
        ids[places] = MASK
        likely = logits(ids[None])[0].double().log_softmax(-1)
        total += weight * likely[places, targets].sum().item()
    return total


def test_scores_are_those_by_hand(
    manifest: Path, folder: Path, tasks: dict, tmp_path: Path
) -> None:
    session = session_of(manifest, tasks, "choice", "pages")
    found = evaluate_node(session, None, tmp_path)
    kept = rows(tmp_path)
    work = session.prepared("choice").work
    assert {len(one.answer) > 3 for one in work.scored["loglikelihood"]} == {True, False}

    def logits(ids: Tensor) -> Tensor:
        return logits_by_hand(folder, ids)

    for name, kind in (("choice", "loglikelihood"), ("pages", "loglikelihood_rolling")):
        work = session.prepared(name).work
        owners = work.owners[kind]
        owners = [owners[one] for one in work.windows] if name == "pages" else owners
        nats = np.zeros(len(work.documents))
        for owner, request in zip(owners, work.scored[kind], strict=True):
            alike = [
                list(one.answer)
                for other, one in zip(owners, work.scored[kind], strict=True)
                if (other, one.prompt) == (owner, request.prompt)
                and len(one.answer) == len(request.answer)
            ]
            beside = min(alike) if name == "choice" else list(request.answer)
            asked = (list(request.prompt), list(request.answer), beside)
            nats[owner] -= bound_by_hand(logits, *asked)
        assert [row["nats"] for row in kept[name]] == pytest.approx(nats.tolist(), rel=1e-5)
    pages = kept["pages"]
    assert found["tasks"]["pages"]["bound"] == pytest.approx(
        sum(row["nats"] for row in pages) / sum(row["predicted"] for row in pages)
    )
    assert "loss" not in found["tasks"]["pages"]
    # Each token of a text is predicted once, in windows of the model's length with the token before it.
    own = session.prepared("pages").work
    windows = own.scored["loglikelihood_rolling"]
    assert {len(one.prompt) + len(one.answer) for one in windows} == {48}
    assert len(windows[0].prompt) == 1
    answers = [
        token
        for one, number in zip(windows, own.windows, strict=True)
        if number == 0
        for token in one.answer
    ]
    request = session.prepared("pages").leaves["pages"].instances[0]
    assert answers == session.lm.tok_encode(request.args[0])


def rows_by_hand(request: Request) -> list[tuple[int, ...]]:
    """Tokens of each of a request's rows."""
    return [
        (*request.prompt, *np.where(masked, MASK, request.answer).tolist())
        for masked in request.sets(SAMPLES).masked
    ]


def counted_by_hand(session: Session, name: str, kind: str) -> list[tuple[int, int]]:
    """Tokens and zeros of each document's rows at NODE, each by itself."""
    work = session.prepared(name).work
    found = [(0, 0)] * len(work.documents)
    for owner, numbers in itertools.groupby(
        sorted(range(len(work.owners[kind])), key=lambda n: work.owners[kind][n]),
        key=lambda n: work.owners[kind][n],
    ):
        distinct = {row for number in numbers for row in rows_by_hand(work.scored[kind][number])}
        tokens = zeros = 0
        for ids in distinct:
            with session.attach(NODE) as counter, torch.no_grad():
                given = torch.tensor([ids])
                counter.expect(torch.ones_like(given, dtype=torch.bool))
                session.lm.model(given)
                zeros += int(counter.take()[0].sum())
            tokens += len(ids)
        found[owner] = (tokens, zeros)
    return found


def test_zeros_go_to_the_document_of_the_row(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    session = session_of(manifest, tasks, "choice", "letters")
    evaluate_node(session, NODE, tmp_path)
    kept = rows(tmp_path)
    for name in ("choice", "letters"):
        wanted = counted_by_hand(session, name, "loglikelihood")
        assert [(r["scoring_tokens"], sum(r["scoring_zeros"])) for r in kept[name]] == wanted
        assert [(r["unique_tokens"], sum(r["unique_zeros"])) for r in kept[name]] == wanted
        assert {row["denoising_tokens"] for row in kept[name]} == {0}
    # Four options of two tokens each, of which the first is the same: twelve rows, six of them distinct.
    scored = session.prepared("letters").work.scored["loglikelihood"]
    assert {len(one.answer) for one in scored} == {2}
    lengths = [len(one.prompt) + 2 for one in scored][::4]
    assert [row["scoring_tokens"] for row in kept["letters"]] == [6 * one for one in lengths]


def test_batches_change_nothing(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    found = {}
    for size in (1, 4, 16):
        evaluate_node(
            session_of(manifest, tasks, batch_size=size, diffusion={"guidance": 0.5}),
            NODE,
            tmp_path / str(size),
        )
        found[size] = rows(tmp_path / str(size))
    for size in (4, 16):
        for name, own in found[1].items():
            for one, other in zip(own, found[size][name], strict=True):
                # Tokens, zeros, what was cut: all but the scores is the same to the last digit.
                for exact in set(one) - {"nats", "metrics"}:
                    assert one[exact] == other[exact]
                assert other["nats"] == pytest.approx(one["nats"], rel=1e-5, abs=1e-5)
                scores = dict(one["metrics"])
                assert dict(other["metrics"]) == pytest.approx(scores, rel=1e-5, abs=1e-5)


def test_masks_are_the_same_at_each_level(manifest: Path, tasks: dict, tmp_path: Path) -> None:
    session = session_of(manifest, tasks, "choice", diffusion={"samples": 3})
    seen: list[list[Tensor]] = []
    for node in (None, NODE, Node.make({"rule": "topp"}, "input", "0.5")):
        own: list[Tensor] = []
        model = session.lm.model
        handle = model.register_forward_pre_hook(lambda _, given, own=own: own.append(given[0]))
        evaluate_node(session, node, tmp_path / str(len(seen)))
        handle.remove()
        seen.append(own)
    first, *others = seen
    assert len(first) > 3
    assert all(
        torch.equal(one, other) for some in others for one, other in zip(first, some, strict=True)
    )


def test_what_the_model_would_say(
    manifest: Path, folder: Path, tasks: dict, tmp_path: Path
) -> None:
    """Answers that are filled in with the surest token first, of a task that asks for them."""
    session = session_of(manifest, tasks, "last", "choice")
    work = session.prepared("choice").work
    assert work.greedy == []
    own = session.prepared("last").work
    # The model is random: what it says are hardly ever the words of the text.
    request = own.scored["loglikelihood"][0]
    assert len(request.answer) > 1
    ids = [*request.prompt, *[MASK] * len(request.answer)]
    while MASK in ids:
        logits = logits_by_hand(folder, torch.tensor([ids]))[0].double()
        logits[:, MASK] = -torch.inf
        likely, token = logits.softmax(-1).max(-1)
        place = max((i for i, one in enumerate(ids) if one == MASK), key=lambda i: likely[i])
        ids[place] = int(token[place])
    said = tuple(ids[len(request.prompt) :])
    object.__setattr__(request, "answer", said)
    evaluate_node(session, NODE, tmp_path / "sparse")
    evaluate_node(session, None, tmp_path / "dense")
    hits = [dict(row["metrics"])["acc,none"] for row in rows(tmp_path / "dense")["last"]]
    assert hits[0] == 1.0
    assert sum(hits[1:]) < len(hits) - 1
    for row, one in zip(rows(tmp_path / "dense")["last"], own.scored["loglikelihood"], strict=True):
        length = len(one.prompt) + len(one.answer)
        assert row["denoising_tokens"] == (len(one.answer) * length if len(one.answer) > 1 else 0)


def stopping(session: Session, patch: pytest.MonkeyPatch, stop: int | None = None) -> list[str]:
    """Note each batch that is computed; break off in place of a further one."""
    calls: list[str] = []

    def wrap(name: str) -> None:
        original = getattr(masked_lm.MaskedLM, name)

        def call(self: Any, *arguments: Any) -> Any:
            if len(calls) == stop:
                raise Interrupted
            calls.append(name)
            return original(self, *arguments)

        patch.setattr(masked_lm.MaskedLM, name, call)

    for name in ("_score", "_said", "_generate"):
        wrap(name)
    return calls


def test_broken_off_at_each_batch_and_resumed(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(at: Path, stop: int | None = None) -> list[str]:
        with monkeypatch.context() as patch:
            session = session_of(manifest, tasks)
            calls = stopping(session, patch, stop)
            if stop is None:
                evaluate_node(session, NODE, at)
            else:
                with pytest.raises(Interrupted):
                    evaluate_node(session, NODE, at)
        return calls

    whole = run(tmp_path / "whole")
    assert set(whole) == {"_score", "_said", "_generate"}
    for stop in range(0, len(whole), max(len(whole) // 4, 1)):
        at = tmp_path / f"stopped-{stop}"
        assert run(at, stop) == whole[:stop]
        assert not (at / "eval.json").exists()
        assert run(at) == whole[stop:]
        assert products(at) == products(tmp_path / "whole")
        assert "steps.parquet" in products(at)


def test_begun_early_as_on_a_gpu(
    manifest: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_node(session_of(manifest, tasks), NODE, tmp_path / "whole")
    whole = products(tmp_path / "whole")
    monkeypatch.setattr(journalled, "AHEAD", {"cpu": 1})
    session = session_of(manifest, tasks)
    with monkeypatch.context() as patch:
        every = stopping(session, patch)
        evaluate_node(session, NODE, tmp_path / "ahead")
    assert products(tmp_path / "ahead") == whole
    session = session_of(manifest, tasks)
    with monkeypatch.context() as patch:
        stopping(session, patch, 3)
        with pytest.raises(Interrupted):
            evaluate_node(session, NODE, tmp_path / "stopped")
    session = session_of(manifest, tasks)
    left = stopping(session, monkeypatch)
    evaluate_node(session, NODE, tmp_path / "stopped")
    assert products(tmp_path / "stopped") == whole
    # Of the three that were begun one was not read.
    assert left == every[2:]


def test_options_of_a_length_have_the_same_masks(folder: Path, tmp_path: Path) -> None:
    """So that two sentences which differ in a word are told apart by few samples."""
    sentences = [
        "the old cat sees a red dog here",
        "the old cat sees a red fox here",
        "the old cat",
    ]
    documents = [
        {"context": "So", "choices": sentences, "label": 0},
        {
            "context": "And",
            "choices": [sentences[0], "a dog here sees the old red cat"],
            "label": 0,
        },
    ]
    task = write_task(tmp_path / "tasks", "sentences", documents, **CHOICE)
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    work = session_of(manifest, {"sentences": task}).prepared("sentences").work
    own = work.scored["loglikelihood"]
    one, two, short, *others = (request.sets(SAMPLES).masked.tolist() for request in own)
    assert len(own[0].answer) == len(own[1].answer) > len(own[2].answer)
    assert one == two
    assert one != short
    assert others[0] == others[1]
    # A row in which the word that differs is masked is one row.
    rows = sum(len(batch.owners) for batch in work.batches["loglikelihood"])
    assert rows < sum(len(request.sets(SAMPLES).masked) for request in own)
