"""Evaluation through the pipeline gives plain lm-eval's numbers, and counts what really ran."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from plain_lm import answers, assert_same, flat, plainly, through_atlas
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.terms import ACCOUNTS
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    MAX_LENGTH,
    ROLLING,
    choice_documents,
    letter_documents,
    open_session,
    rolling_documents,
    save_model,
    sentences,
    write_model_manifest,
    write_task,
)

TOPP = {"rule": "topp"}
# A task's own function, which takes its document apart.
OWN_RESULTS = """
def taking(document, results):
    likelihoods = [score for score, _ in results]
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    document.pop("context")
    return {"acc": float(best == document["label"]), "acc_norm": float(len(document))}
"""
FILTERS = [
    {"name": name, "filter": [{"function": name}, {"function": "take_first"}]}
    for name in ("lowercase", "uppercase")
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One task of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    long = GENERATION["generation_kwargs"] | {"until": ["the", "r"], "max_gen_toks": 7}
    tasks = {
        "choice": write_task(folder, "choice", choice_documents(), **CHOICE),
        "letters": write_task(folder, "letters", letter_documents(), **CHOICE),
        "rolling": write_task(folder, "rolling", rolling_documents(), **ROLLING),
        "last": write_task(folder, "last", rolling_documents(9, 3), **LAST_WORD),
        "words": write_task(folder, "words", rolling_documents(9, 4), **GENERATION),
        "tail": write_task(
            folder, "tail", rolling_documents(5, 8), **GENERATION | {"generation_kwargs": long}
        ),
        "filtered": write_task(
            folder, "filtered", rolling_documents(7, 9), **GENERATION | {"filter_list": FILTERS}
        ),
        "twice": write_task(folder, "twice", rolling_documents(5, 4), **GENERATION, repeats=2),
        "shots": write_task(
            folder,
            "shots",
            choice_documents(8, 11),
            **CHOICE,
            fewshot_split="test",
            num_fewshot=2,
            fewshot_config={"sampler": "default"},
        ),
    }
    (folder / "results.py").write_text(OWN_RESULTS)
    config = (folder / "choice.yaml").read_text().replace("task: choice", "task: own")
    (folder / "own.yaml").write_text(config + "process_results: !function results.taking\n")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [choice, letters]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    (folder / "writing.yaml").write_text("group: writing\ntask: [words, tail]\n")
    return {
        **tasks,
        **{name: {"task": name, "include": str(folder)} for name in ("own", "both", "writing")},
    }


KINDS = (
    *("choice", "letters", "rolling", "last", "words", "filtered", "twice", "own"),
    *("both", "writing", "shots"),
)


@pytest.mark.parametrize("node", [None, ("topp", "all_inputs", "1")])
def test_scores_are_plain_lm_eval_s(
    catalogue: dict,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    node: tuple[str, str, str] | None,
) -> None:
    session = open_session(manifest, {name: catalogue[name] for name in KINDS})
    made = Node.make({"rule": node[0]}, *node[1:]) if node else None
    outcomes = through_atlas(session, made, tmp_path, monkeypatch)
    include = Path(catalogue["choice"]["include"])
    for name in KINDS:
        assert_same(outcomes[name], plainly(session, name, include, 3))
    # The cases are what they claim to be.
    assert any(len(text["page"]) > 4 * MAX_LENGTH for text in rolling_documents())
    assert outcomes["both"]["groups"]["both"]["acc,none"] > 0
    lengths = {len(flat(answer[0])[0]) for answer in answers(outcomes["words"]).values()}
    assert len(lengths) > 3


@pytest.mark.parametrize(("own", "bos"), [(True, None), (True, False), (False, True)])
def test_bos_token(
    catalogue: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bos: bool | None,
    own: bool,
) -> None:
    folder = save_model(tmp_path / "model", bos=own)
    path = write_model_manifest(folder, tmp_path / "model.json")
    names = ("letters", "rolling", "words")
    settings = {"add_bos_token": bos, "lm_eval_prefix": True, "max_length": 24}
    session = open_session(path, {name: catalogue[name] for name in names}, **settings)
    outcomes = through_atlas(session, None, tmp_path / "dense", monkeypatch)
    include = Path(catalogue["choice"]["include"])
    for name in names:
        options = {"add_bos_token": bos, "max_length": 24}
        assert_same(outcomes[name], plainly(session, name, include, 4, lm=options))


def test_chat_template_and_few_shot_turns(
    catalogue: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", bos=True, chat=True)
    path = write_model_manifest(folder, tmp_path / "model.json")
    names = ("shots", "words")
    session = open_session(
        path, {name: catalogue[name] for name in names}, apply_chat_template=True
    )
    outcomes = through_atlas(session, None, tmp_path / "dense", monkeypatch)
    for name in names:
        plain = plainly(
            session,
            name,
            Path(catalogue["choice"]["include"]),
            4,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
        assert_same(outcomes[name], plain)
        prompt = str(plain["samples"][name][0]["arguments"])
        assert "<user>" in prompt


def test_fewer_shots_than_the_task_says(
    catalogue: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(manifest, {"shots": catalogue["shots"] | {"num_fewshot": 1, "limit": 5}})
    outcomes = through_atlas(session, None, tmp_path, monkeypatch)
    plain = plainly(
        session, "shots", Path(catalogue["shots"]["include"]), 4, num_fewshot=1, limit=5
    )
    assert_same(outcomes["shots"], plain)


def test_a_task_s_own_function_gets_a_whole_document_each_time(
    catalogue: dict, manifest: Path, tmp_path: Path
) -> None:
    session = open_session(manifest, {"own": catalogue["own"]})
    first = evaluate_node(session, None, tmp_path / "first")
    assert evaluate_node(session, None, tmp_path / "second") == first


# Batches


@pytest.mark.parametrize("level", ["0.6", "0.05"])
def test_batch_size_changes_no_accuracy_and_no_count(
    catalogue: dict, manifest: Path, tmp_path: Path, level: str
) -> None:
    tasks = {name: catalogue[name] for name in ("choice", "letters", "rolling", "last", "writing")}
    node = Node.make(TOPP, "all_inputs", level)
    results, tables = [], []
    for size in (1, 16):
        session = open_session(manifest, tasks, batch_size=size)
        results.append(evaluate_node(session, node, tmp_path / str(size))["tasks"])
        tables.append(read_table(tmp_path / str(size) / "samples.parquet")[1].to_pylist())
    for name in tasks:
        one, many = (result[name] for result in results)
        assert one["sparsity"] == many["sparsity"]
        assert one["tokens"] == many["tokens"]
        for leaf, scores in one["scores"].items():
            for key, value in scores.items():
                exact = key.startswith(("acc", "exact_match"))
                tolerance = 0 if exact else 1e-4
                assert many["scores"][leaf][key] == pytest.approx(value, rel=tolerance, abs=0)
    for one, many in zip(*tables, strict=True):
        assert one["nats"] == pytest.approx(many["nats"], abs=1e-4)
        for account in ACCOUNTS:
            assert one[f"{account}_zeros"] == many[f"{account}_zeros"]
            assert one[f"{account}_tokens"] == many[f"{account}_tokens"]


# Counts


def by_hand(
    session: Session, ids: list[int], level: float, cached: int | None = None
) -> tuple[np.ndarray, torch.Tensor]:
    """Zeros of each layer's intermediate tensor over some tokens, top-k masked without our hooks.

    cached: tokens that stand in the cache, so that only what follows is counted.
    """
    model, zeros = session.lm.model, []

    def mask(module: torch.nn.Module, inputs: tuple) -> tuple:
        (values,) = inputs
        keep = int(level * values.shape[-1])
        smallest = values.abs().topk(keep, dim=-1).values[..., -1:]
        values = values.where(values.abs() >= smallest, 0)
        zeros.append((values == 0).sum(-1)[0])
        return (values,)

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(mask) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.stack(zeros)[:, cached or 0 :].sum(1).numpy(), logits


def test_counts_of_scored_requests(catalogue: dict, manifest: Path, tmp_path: Path) -> None:
    session = open_session(manifest, {name: catalogue[name] for name in ("choice", "letters")})
    evaluate_node(session, Node.make({"rule": "topk"}, "intermediate", "0.45"), tmp_path)
    header, table = read_table(tmp_path / "samples.parquet")
    assert header["slots"] == [["intermediate", 0, 40], ["intermediate", 1, 40]]
    documents = {"choice": choice_documents(), "letters": letter_documents()}
    encode = session.lm.tok_encode
    known: set[tuple[str, ...]] = set()
    for row in table.to_pylist():
        document = documents[row["leaf"]][row["doc_id"]]
        context = len(encode(document["context"]))
        zeros, tokens, nats = 0, 0, 0.0
        for option in document["choices"]:
            whole = encode(f"{document['context']} {option}")
            counted, logits = by_hand(session, whole[:-1], 0.45)
            key = (row["leaf"], *whole[:-1])
            # What runs the same tokens is run once, for the first that asks.
            zeros = zeros + counted * (key not in known)
            tokens += (len(whole) - 1) * (key not in known)
            known.add(key)
            scores = logits.log_softmax(-1)[context - 1 :]
            nats -= float(scores.gather(1, torch.tensor(whole[context:])[:, None]).sum())
        assert row["scoring_zeros"] == zeros.tolist()
        assert row["scoring_tokens"] == tokens
        for phase in ("prompt", "generation", "denoising"):
            assert row[f"{phase}_tokens"] == 0
            assert row[f"{phase}_zeros"] == []
        assert row["nats"] == pytest.approx(nats, abs=1e-3)


@pytest.mark.parametrize("name", ["choice", "letters", "again", "rolling", "last", "both"])
def test_as_many_tokens_as_lm_eval_runs(
    catalogue: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Questions that come again, within the context and cut to it.
    documents = [
        d | {"context": " ".join([d["context"]] * (1 + 8 * (i % 2)))}
        for i, d in enumerate(letter_documents(4) + choice_documents(4))
    ]
    entry = write_task(tmp_path / "again", "again", documents[::-1] + documents, **CHOICE)
    session = open_session(manifest, {name: {**catalogue, "again": entry}[name]})
    (result,) = evaluate_node(session, None, tmp_path / "dense")["tasks"].values()
    run = 0

    def counting(lm: HFLM, inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal run
        run += int((inputs != session.lm.tokenizer.pad_token_id).sum())
        return original(lm, inputs, **options)

    original = HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", counting)
    # Windows of whole documents are merged in batches, if at all: not at batch size 1.
    plainly(session, name, Path({**catalogue, "again": entry}[name]["include"]), 1)
    assert result["tokens"]["scoring"] == run
    assert result["tokens"]["prompt"] == 0


def test_a_question_that_comes_again_counts_with_the_first(manifest: Path, tmp_path: Path) -> None:
    entry = write_task(tmp_path / "tasks", "again", letter_documents(3) * 2, **CHOICE)
    node = Node.make({"rule": "topk"}, "intermediate", "0.45")
    evaluate_node(open_session(manifest, {"again": entry}), node, tmp_path / "node")
    rows = read_table(tmp_path / "node" / "samples.parquet")[1].to_pylist()
    for first, second in zip(rows[:3], rows[3:], strict=True):
        assert second["scoring_tokens"] == sum(second["scoring_zeros"]) == 0
        assert first["scoring_tokens"] == first["unique_tokens"] == second["unique_tokens"]
        assert first["unique_zeros"] == second["unique_zeros"] == first["scoring_zeros"]
        assert first["nats"] == second["nats"]


def test_counts_without_repetition(catalogue: dict, manifest: Path, tmp_path: Path) -> None:
    names = ("choice", "letters", "words", "twice")
    session = open_session(manifest, {name: catalogue[name] for name in names})
    result = evaluate_node(session, Node.make({"rule": "topk"}, "intermediate", "0.45"), tmp_path)
    table = read_table(tmp_path / "samples.parquet")[1].to_pylist()
    encode = session.lm.tok_encode
    documents = {"choice": choice_documents(), "letters": letter_documents()}
    for row in table:
        if row["leaf"] not in documents:
            # A prompt stands once, however often it is continued.
            share = 2 if row["leaf"] == "twice" else 1
            assert share * row["unique_tokens"] == row["prompt_tokens"]
            assert [share * n for n in row["unique_zeros"]] == row["prompt_zeros"]
            continue
        document = documents[row["leaf"]][row["doc_id"]]
        prefixes = set()
        for option in document["choices"]:
            run = encode(f"{document['context']} {option}")[:-1]
            prefixes |= {tuple(run[:end]) for end in range(1, len(run) + 1)}
        zeros = sum(by_hand(session, list(prefix), 0.45, len(prefix) - 1)[0] for prefix in prefixes)
        assert row["unique_tokens"] == len(prefixes)
        assert row["unique_zeros"] == zeros.tolist()
    for name in names:
        rows = [row for row in table if row["task"] == name]
        tokens = sum(row["unique_tokens"] for row in rows)
        zeros = sum(sum(row["unique_zeros"]) for row in rows)
        assert result["tasks"][name]["tokens"]["unique"] == tokens
        assert result["tasks"][name]["sparsity"]["intermediate"]["unique"] == zeros / (80 * tokens)


@pytest.mark.parametrize("budget", [12, 4])
def test_counts_of_generation(catalogue: dict, manifest: Path, tmp_path: Path, budget: int) -> None:
    entry = catalogue["words"] | {"max_gen_toks": budget}
    session = open_session(manifest, {"words": entry}, batch_size=16)
    result = evaluate_node(session, Node.make({"rule": "topk"}, "intermediate", "0.45"), tmp_path)[
        "tasks"
    ]["words"]
    rows = read_table(tmp_path / "samples.parquet")[1].to_pylist()
    decode, tokenizer = session.lm.tok_decode, session.lm.tokenizer
    for row, document in zip(rows, rolling_documents(9, 4), strict=True):
        ids = session.lm.tok_encode(document["page"])[-(MAX_LENGTH - budget) :]
        prompt, zeros, unfinished = len(ids), None, 1
        for _ in range(budget):
            zeros, logits = by_hand(session, ids, 0.45, prompt)
            ids.append(int(logits[-1].argmax()))
            made = decode(ids[prompt:], skip_special_tokens=False)
            if ids[-1] == tokenizer.eos_token_id or "e" in made or "\n" in made:
                unfinished = 0
                break
        assert row["unfinished"] == unfinished
        assert row["prompt_tokens"] == prompt
        assert row["prompt_zeros"] == by_hand(session, ids[:prompt], 0.45)[0].tolist()
        # The last token that a row generates is never fed.
        assert row["generation_tokens"] == len(ids) - prompt - 1
        assert row["generation_zeros"] == zeros.tolist()
    fed = [row["generation_tokens"] for row in rows]
    unfinished = [row["unfinished"] for row in rows]
    assert set(unfinished) == ({0} if budget == 12 else {0, 1})
    assert result["cut"]["unfinished"] == sum(unfinished)
    assert len(set(fed)) > 2  # rows of one batch that finish apart
    assert result["tokens"]["generation"] == sum(fed)
    share = result["sparsity"]["intermediate"]
    assert share["generation"] == sum(sum(row["generation_zeros"]) for row in rows) / (
        80 * sum(fed)
    )
    assert share["total"] == share["zeros"] / share["entries"]


def test_requests_in_one_row_are_both_credited(
    catalogue: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(manifest, {"letters": catalogue["letters"]}, batch_size=64)
    shapes = []
    original = session.lm._model_call
    monkeypatch.setattr(
        session.lm,
        "_model_call",
        lambda inputs, **options: shapes.append(inputs.shape) or original(inputs, **options),
    )
    evaluate_node(session, None, tmp_path)
    rows = read_table(tmp_path / "samples.parquet")[1].to_pylist()
    # Four options of one token each: one row of the batch, whose tokens count once.
    assert [shape[0] for shape in shapes] == [len({one["context"] for one in letter_documents()})]
    for row, document in zip(rows, letter_documents(), strict=True):
        ids = session.lm.tok_encode(document["context"])
        assert row["scoring_tokens"] == len(ids) + len(session.lm.tok_encode(" A")) - 1


def test_all_zero_rows_and_natural_zeros_count(catalogue: dict, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", hidden_act="relu")
    path = write_model_manifest(folder, tmp_path / "model.json")
    session = open_session(path, {"letters": catalogue["letters"]})
    dense = evaluate_node(session, None, tmp_path / "dense")["tasks"]["letters"]["sparsity"]
    kept = evaluate_node(session, Node.make(TOPP, "intermediate", "1"), tmp_path / "one")
    assert kept["tasks"]["letters"]["sparsity"]["intermediate"] == dense["intermediate"]
    assert 0.3 < dense["intermediate"]["total"] < 0.7
    assert dense["gate"]["zeros"] == dense["intermediate"]["zeros"]
    assert dense["up"]["zeros"] == 0
    nothing = evaluate_node(
        session, Node.make({"rule": "topk"}, "intermediate", "0"), tmp_path / "none"
    )
    assert nothing["tasks"]["letters"]["sparsity"]["intermediate"]["total"] == 1


@pytest.mark.parametrize("rule", ["topp", "topk", "maxp"])
@pytest.mark.parametrize("site", ["up", "gate", "all_inputs"])
def test_no_hook_waits_for_the_device(manifest: Path, rule: str, site: str) -> None:
    session = open_session(manifest, {})
    # A tensor on `meta` has no values: whatever would be read from the device fails.
    session.lm.model.to("meta")
    ids = torch.zeros(3, 9, dtype=torch.long, device="meta")
    with session.attach(Node.make({"rule": rule}, site, "0.5")) as counter, torch.no_grad():
        counter.expect(torch.ones(3, 9, dtype=torch.bool, device="meta"))
        session.lm.model(ids)
        zeros, _, finite = counter.take_unseen()
        assert zeros.shape == (4 if site == "all_inputs" else 2, 3, 9)
        assert zeros.device.type == finite.device.type == "meta"


# Failure


@pytest.mark.parametrize(
    ("kind", "broken"), [("choice", "nan"), ("words", "inf"), ("sampled", "inf")]
)
def test_nan_is_reported_with_its_layer(
    catalogue: dict, manifest: Path, tmp_path: Path, kind: str, broken: str
) -> None:
    sampling = {"generation_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": 5}}
    write_task(tmp_path / "t", "sampled", rolling_documents(3), **GENERATION | sampling)
    tasks = {**catalogue, "sampled": {"task": "sampled", "include": str(tmp_path / "t")}}
    session = open_session(manifest, {kind: tasks[kind], "letters": catalogue["letters"]})
    weight = session.lm.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 4] = float(broken)
    result = evaluate_node(session, Node.make(TOPP, "intermediate", "0.9"), tmp_path / "node")
    assert result["status"] == "failed"
    assert result["tasks"][kind] == {
        "status": "failed",
        "reason": "NaN or infinity in 'intermediate' of layer 1",
    }


def test_nan_after_the_last_site_is_reported(
    catalogue: dict, manifest: Path, tmp_path: Path
) -> None:
    session = open_session(manifest, {name: catalogue[name] for name in ("choice", "words")})
    with torch.no_grad():
        session.lm.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    result = evaluate_node(session, Node.make(TOPP, "intermediate", "0.9"), tmp_path)
    for task in result["tasks"].values():
        assert task == {"status": "failed", "reason": "NaN or infinity in the logits"}


def test_a_failed_task_leaves_the_others_alone(
    catalogue: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(manifest, {name: catalogue[name] for name in ("letters", "last")})
    original, calls = session.lm._model_call, itertools.count()

    def first_fails(inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = original(inputs, **options)
        return logits * float("nan") if next(calls) == 0 else logits

    monkeypatch.setattr(session.lm, "_model_call", first_fails)
    result = evaluate_node(session, None, tmp_path)
    assert [task["status"] for task in result["tasks"].values()] == ["failed", "ok"]
    # A failure is a result: asked for again, nothing runs.
    before = next(calls)
    assert evaluate_node(session, None, tmp_path) == result
    assert next(calls) == before + 1


# Odd requests


def test_requests_that_run_the_same_tokens_but_score_more_or_fewer_of_them(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [
        {"context": "the old cat", "target": " sees a"},
        {"context": "the old cat sees", "target": " the"},
    ]
    sides = {"doc_to_text": "{{context}}", "doc_to_target": "{{target}}"}
    entry = write_task(tmp_path / "tasks", "split", documents, **LAST_WORD | sides)
    session = open_session(manifest, {"split": entry})
    ours = through_atlas(session, None, tmp_path / "dense", monkeypatch)["split"]
    plain, cached = (
        plainly(session, "split", tmp_path / "tasks", 4, lm={"logits_cache": cache})
        for cache in (False, True)
    )
    assert_same(ours, plain)
    # With its cache, which is the default, lm-eval reads the shorter continuation at the first of the
    # longer one's tokens.
    right, wrong = (answers(one)["split", 1, "none"][0][0][0][0] for one in (ours, cached))
    whole = session.lm.tok_encode(" sees a")
    with torch.no_grad():
        ids = session.lm.tok_encode("the old cat sees")
        scores = session.lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    (token,) = session.lm.tok_encode(" the")
    assert right == pytest.approx(float(scores[-1, token]), abs=1e-4)
    assert wrong == pytest.approx(float(scores[-len(whole), token]), abs=1e-4)
    assert abs(right - wrong) > 0.1


def test_what_is_longer_than_the_context_is_counted(
    catalogue: dict, manifest: Path, tmp_path: Path
) -> None:
    documents = letter_documents(4)
    documents[1]["context"] = " ".join([documents[1]["context"]] * 12)
    entry = write_task(tmp_path / "tasks", "lengthy", documents, **CHOICE)
    names = ("letters", "rolling", "twice", "both")
    session = open_session(manifest, {**{n: catalogue[n] for n in names}, "lengthy": entry})
    tasks = evaluate_node(session, None, tmp_path / "dense")["tasks"]
    table = read_table(tmp_path / "dense" / "samples.parquet")[1].to_pylist()
    rows = {name: [row for row in table if row["task"] == name] for name in tasks}
    encode = session.lm.tok_encode

    assert {row["windows"] for name in tasks if name != "rolling" for row in rows[name]} == {0}
    assert [row["cut_tokens"] for row in rows["letters"] + rows["both"]] == [0] * (10 + 14 + 10)
    # The answer's last token is not run.
    lost = len(encode(f"{documents[1]['context']} A")) - (MAX_LENGTH + 1)
    assert [row["cut_tokens"] for row in rows["lengthy"]] == [0, lost, 0, 0]
    assert lost > 0
    prompts = [len(encode(page["page"])) - (MAX_LENGTH - 12) for page in rolling_documents(5, 4)]
    assert [row["cut_tokens"] for row in rows["twice"]] == [max(over, 0) for over in prompts]
    windows = [-(-len(encode(page["page"])) // MAX_LENGTH) for page in rolling_documents()]
    assert [row["windows"] for row in rows["rolling"]] == windows
    assert {row["cut_tokens"] for row in rows["rolling"]} == {0}
    for name, result in tasks.items():
        cut = [row["cut_tokens"] for row in rows[name]]
        assert result["cut"] == {
            "items": sum(one > 0 for one in cut),
            "tokens": sum(cut),
            "unfinished": sum(row["unfinished"] > 0 for row in rows[name]),
            "windowed": sum(row["windows"] > 1 for row in rows[name]),
            "windows": sum(row["windows"] for row in rows[name]),
        }
    assert tasks["twice"]["cut"]["items"] > 0 < tasks["rolling"]["cut"]["windowed"]


def test_empty_documents_cost_nothing(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [{"page": text} for text in ("", sentences(1)[0])]
    entry = write_task(
        tmp_path / "tasks",
        "pages",
        documents,
        **ROLLING | {"metric_list": [{"metric": "bits_per_byte"}]},
    )
    session = open_session(manifest, {"pages": entry})
    evaluate_node(session, None, tmp_path / "dense")
    rows = read_table(tmp_path / "dense" / "samples.parquet")[1].to_pylist()
    assert rows[0]["scoring_tokens"] == rows[0]["predicted"] == rows[0]["nats"] == 0
    assert rows[1]["scoring_tokens"] == rows[1]["predicted"] > 0


def test_a_continuation_longer_than_the_context_fails_its_task(
    manifest: Path, tmp_path: Path
) -> None:
    option = " ".join(sentences(20))
    documents = [{"context": "the cat", "choices": [option, "a"], "label": 0}]
    entry = write_task(tmp_path / "tasks", "lengthy", documents, **CHOICE)
    session = open_session(manifest, {"lengthy": entry})
    (result,) = evaluate_node(session, None, tmp_path / "dense")["tasks"].values()
    assert result["status"] == "failed"
    assert re.search(r"max_length: .* tokens to score, at most 48 can", result["reason"])


def test_beam_search_is_refused(manifest: Path, tmp_path: Path) -> None:
    options = {"generation_kwargs": {"num_beams": 2, "max_gen_toks": 5, "until": ["x"]}}
    entry = write_task(tmp_path / "tasks", "beams", rolling_documents(2), **GENERATION | options)
    session = open_session(manifest, {"beams": entry})
    result = evaluate_node(session, None, tmp_path / "dense")["tasks"]["beams"]
    assert result["status"] == "failed"
    assert "num_beams" in result["reason"]
