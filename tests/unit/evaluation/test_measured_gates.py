"""Texts before prompts: the same is scored behind them, and gates are compared token by token."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkout import ROOT
from sparsity_atlas.curves import curve
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.gates.gate_table import NAME, QUANTITIES, SCHEMA, read_table
from sparsity_atlas.evaluation.gates.measured_gates import common_end, gate_numbers, prompts
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table as read_samples
from sparsity_atlas.tables.studies.insertions import gate_rows
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    sentences,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PUT = {"text": "the end ", "times": 3}
ALONE = {**CHOICE, "doc_to_text": "", "target_delimiter": ""}
KINDS = {"choice": CHOICE, "alone": ALONE, "pages": ROLLING, "words": GENERATION}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Tasks of three kinds, each with and without a text before its prompts."""
    folder = tmp_path_factory.mktemp("tasks")
    found = {}
    for name, config in KINDS.items():
        chosen = name in ("choice", "alone")
        documents = choice_documents(12) if chosen else rolling_documents(11, 3)
        if not chosen:
            documents += [{"page": text} for text in sentences(1, 9, 6, 7)]
        found[name] = write_task(folder, name, documents, **config)
        found[f"{name}_behind"] = {**found[name], "inserted": PUT}
    return found


@pytest.fixture(scope="module")
def session(manifest: Path, entries: dict[str, dict[str, Any]]) -> Session:
    return open_session(manifest, entries)


def test_prompts_have_the_text_behind_bos_and_before_all_else(session: Session) -> None:
    lm = session.lm
    run = lm.tok_encode(PUT["text"] * PUT["times"], add_special_tokens=False)
    for name in KINDS:
        plain = prompts(lm, session.tasks[name], session.seed)
        behind = prompts(lm, session.tasks[f"{name}_behind"], session.seed)
        for key, ids in behind.items():
            own = plain[key]
            start = 1 if own[0] == lm.prefix_token_id else 0
            assert ids[:start] == own[:start]
            if name in ("alone", "pages"):
                assert ids == [*own[:start], *run, *own[start:]]
            else:
                # A text that is read as one may join its first letters to the space before them.
                assert ids[start : start + len(run) - 1] == run[:-1]
                assert common_end(own, ids) >= len(own) - start - 2


def test_what_is_scored_and_of_which_documents_is_the_same(
    session: Session, tmp_path: Path
) -> None:
    evaluate_node(session, None, tmp_path / "dense")
    _, table = read_samples(tmp_path / "dense" / "samples.parquet")
    rows = table.to_pylist()
    of = {name: [row for row in rows if row["task"] == name] for name in session.tasks}
    for name in KINDS:
        plain, behind = of[name], of[f"{name}_behind"]
        for key in ("leaf", "doc_id", "doc_hash", "predicted"):
            assert [row[key] for row in plain] == [row[key] for row in behind]
        run = [sum(row["unique_tokens"] for row in rows) for rows in (plain, behind)]
        # Long prompts are cut to the model's context, with the text or without.
        assert run[1] > run[0] or name == "words"
    differ = [
        (one["nats"], other["nats"])
        for one, other in zip(of["pages"], of["pages_behind"], strict=True)
    ]
    assert all(one != other for one, other in differ)


def test_the_first_window_of_a_document_is_scored_behind_the_text(
    session: Session, tmp_path: Path
) -> None:
    """The sum of a short document's losses, by one pass of the model over BOS, the text and the document."""
    lm = session.lm
    name = "pages_behind"
    ids = prompts(lm, session.tasks[name], session.seed)
    short = min(ids.items(), key=lambda one: len(one[1]))
    (leaf, number), tokens = short
    run = len(lm.tok_encode(PUT["text"] * PUT["times"], add_special_tokens=False))
    with torch.no_grad():
        logits = lm.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    own = tokens[1 + run :]
    wanted = -sum(float(logits[run + i, token]) for i, token in enumerate(own))
    assert len(tokens) <= lm.max_length + 1
    only = Session(lm, session.parts, {name: session.tasks[name]}, session.seed, session.identity)
    evaluate_node(only, None, tmp_path / "dense")
    rows = read_samples(tmp_path / "dense" / "samples.parquet")[1].to_pylist()
    (row,) = (row for row in rows if (row["leaf"], row["doc_id"]) == (leaf, number))
    assert row["predicted"] == len(own)
    assert row["nats"] == pytest.approx(wanted, abs=1e-3)


def test_gate_numbers_by_hand() -> None:
    before = torch.tensor([[0.0, 3.0], [-4.0, 1.0]])
    after = torch.tensor([[0.1, 3.0], [-5.0, 1.0]])
    # |g| before: 0, 1, 3, 4 with the lower median 1; deviations 0, 1, 2, 3 with the lower median 1.
    found = gate_numbers(before, after)
    # So ε is .13 · 1.4826 = .193.
    assert found["near_zero_before"] == found["near_zero_after"] == 0.25
    assert found["l1_before"] == pytest.approx((3 + 5) / 2)
    assert found["l1_after"] == pytest.approx((3.1 + 6) / 2)
    assert found["l2_before"] == pytest.approx((3 + 17**0.5) / 2)
    # Of two entries the Gini coefficient is half of their difference over their sum.
    assert found["gini_before"] == pytest.approx((0.5 * 3 / 3 + 0.5 * 3 / 5) / 2)
    assert found["gini_after"] == pytest.approx((0.5 * 2.9 / 3.1 + 0.5 * 4 / 6) / 2)
    assert gate_numbers(0 * before, before)["gini_before"] == 0


def test_gates_of_the_same_tokens_against_hooks(session: Session, tmp_path: Path) -> None:
    evaluate_node(session, None, tmp_path / "dense")
    table = read_table(tmp_path / "dense" / NAME)
    assert set(table.tasks) == {f"{name}_behind" for name in KINDS}
    lm, name = session.lm, "choice_behind"
    plain = prompts(lm, session.tasks["choice"], session.seed)
    behind = prompts(lm, session.tasks[name], session.seed)
    rows = table.rows[name].to_pylist()
    layers = len(lm.model.model.layers)
    assert len(rows) == layers * len(plain)
    for row in rows[:: layers + 1]:
        key = row["leaf"], row["doc_id"]
        last = common_end(plain[key], behind[key])
        assert row["tokens"] == last
        assert row["inserted"] == len(behind[key]) - len(plain[key]) > 0
        gates: list[torch.Tensor] = []
        act = lm.model.model.layers[row["layer"]].mlp.act_fn
        for ids in (plain[key], behind[key]):
            keep = partial(lambda to, *given: to.append(given[2][0]), gates)
            handle = act.register_forward_hook(keep)
            with torch.no_grad():
                lm.model(torch.tensor([ids]))
            handle.remove()
        for number, when in enumerate(("before", "after")):
            own = gates[number][-last:].double().abs()
            assert row[f"l1_{when}"] == pytest.approx(float(own.sum(1).mean()), rel=1e-5)
            assert row[f"l2_{when}"] == pytest.approx(float(own.norm(dim=1).mean()), rel=1e-5)


def test_gates_are_measured_once(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_node(session, None, tmp_path / "dense")
    content = (tmp_path / "dense" / NAME).read_bytes()
    monkeypatch.setattr("sparsity_atlas.evaluation.gates.measured_gates.gate_rows", None)
    evaluate_node(session, None, tmp_path / "dense")
    assert (tmp_path / "dense" / NAME).read_bytes() == content
    # No node but the dense one has such a table, and none where no task has such a text.
    node = Node.make({"rule": "topk"}, "gate", "0.5")
    evaluate_node(session, node, tmp_path / "node")
    assert not (tmp_path / "node" / NAME).exists()


def test_the_table_has_means_over_documents(session: Session, tmp_path: Path) -> None:
    model = tmp_path / "m"
    evaluate_node(session, None, model / "dense")
    rows = list(gate_rows([model / "model.json", tmp_path / "other" / "model.json"]))
    assert {row["quantity"] for row in rows} == set(QUANTITIES)
    own = read_table(model / "dense" / NAME).rows["pages_behind"].to_pylist()
    for row in rows:
        if (row["task"], row["layer"], row["quantity"]) == ("pages_behind", 0, "l2"):
            each = [one for one in own if one["layer"] == 0]
            means = [np.mean([one[f"l2_{when}"] for one in each]) for when in ("before", "after")]
            assert [row["value_before"], row["value_after"]] == pytest.approx(means)
            assert row["difference"] == pytest.approx(means[1] - means[0])
            assert row["low"] <= row["difference"] <= row["high"]
            assert row["documents"] == len(each)


def test_scores_with_and_without_are_paired(session: Session, tmp_path: Path) -> None:
    evaluate_node(session, None, tmp_path / "dense")
    node = Node.make({"rule": "topk"}, "gate", "0.5")
    evaluate_node(session, node, tmp_path / "0.5")
    dense, level = (curve.NodeSamples(tmp_path / name, "gate") for name in ("dense", "0.5"))
    entries = {"pages": {}, "pages_behind": {"before": "pages"}, "choice": {"metric": "acc"}}
    entries |= {"choice_behind": {"metric": "acc", "before": "choice"}}
    settings = {"tasks": entries, "replicates": 200, "seed": 0, "bars": [0.99]}
    nodes = {"0.5": level}
    samples = curve.all_samples(dense, nodes, settings)
    estimates = curve.estimate_all(samples, 200, 0, beside=curve.made_of(settings))
    content = curve.build(dense, nodes, samples, estimates, settings, "gate")
    rows = {(row["task"], row["level"]): row for row in content["inserted"]}
    assert set(rows) == {
        (f"{name}_behind", at) for name in ("pages", "choice") for at in ("dense", "0.5")
    }
    for at, one in (("dense", dense), ("0.5", level)):
        with_it, plain = (one.rows(name) for name in ("pages_behind", "pages"))
        nats = [rows_["nats"].to_numpy() for rows_ in (with_it, plain)]
        wanted = (nats[0] - nats[1]).sum() / plain["predicted"].to_numpy().sum()
        row = rows["pages_behind", at]
        assert row["difference"] == pytest.approx(wanted)
        assert row["low"] <= row["difference"] <= row["high"]
    # The average is of the tasks as they are.
    averages = [row for row in content["points"] if row["task"] == "average"]
    plain = [row for row in content["points"] if row["task"] == "choice"]
    assert [row["value"] for row in averages] == [row["value"] for row in plain]
    assert content["beside"] == {"pages_behind": "pages", "choice_behind": "choice"}


def test_documented_columns_are_those_of_the_file() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = text.split("/gates.parquet`\n")[1].split("\n###")[0]
    named = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert named == SCHEMA.names
