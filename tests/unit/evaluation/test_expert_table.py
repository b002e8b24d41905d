"""Tokens and zeros of each expert, against a loop over requests, tokens and experts in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from interruptions import Interrupted, products, watch
from sparsity_atlas.config.schema import parse
from sparsity_atlas.evaluation import evaluate as evaluation
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.expert_table import COUNTS, NAME, read_table
from sparsity_atlas.evaluation.headed_table import CountTable
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table as read_samples
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.lm import forest, journalled
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.tasks import request_cache
from sparsity_atlas.upkeep.clean import orphans
from sparsity_atlas.upkeep.doctor import examine
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

EXPERTS, EACH, HIDDEN, WIDTH = 24, 2, 24, 16
MIXTURE = {
    **{"kind": "olmoe", "num_experts": EXPERTS, "num_experts_per_tok": EACH},
    # Of SiLU nothing is zero by itself.
    **{"hidden_size": HIDDEN, "intermediate_size": WIDTH, "hidden_act": "relu"},
}
LEVEL = 0.8
Counts = dict[
    tuple[str, int, str], np.ndarray
]  # phase, layer, tensor: [run or once, tokens or zeros, expert]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OLMoE."""
    return save_model(tmp_path_factory.mktemp("models") / "olmoe", **MIXTURE)


@pytest.fixture(scope="module")
def manifest(mixture: Path) -> Path:
    return write_model_manifest(mixture, mixture.parent / "results" / "model.json")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One task of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    sampled = GENERATION | {"repeats": 2}
    return {
        "choice": write_task(folder, "choice", choice_documents(6), **CHOICE),
        # Options of one token: their requests run the same tokens, and count as one.
        "letters": write_task(folder, "letters", letter_documents(2), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(2), **ROLLING),
        "words": write_task(folder, "words", rolling_documents(5, 4), **sampled),
    }


def node_of(site: str) -> Node:
    return Node.make({"rule": "topp"}, site, str(LEVEL))


def kept(values: Tensor) -> Tensor:
    """Top-p by its definition, of one vector: the fewest entries that hold the share, and what ties."""
    largest = values.abs().sort(descending=True).values
    reached = int((largest.cumsum(0) < LEVEL * largest.sum()).sum())
    return values.abs() >= largest[min(reached, len(largest) - 1)]


class Loop:
    """An OLMoE in float64 whose experts are run one token and one expert at a time.

    Attributes:
        seen: of the last pass, by layer and tensor, the expert and the zeros of each pair, by token.
        weights: of the last pass, by tensor, those that read it, pair by pair, and those of them that read
            a zero.
    """

    def __init__(self, folder: Path, dropped: tuple[str, ...]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.dropped = dropped
        self.seen: dict[tuple[int, str], dict[int, list[tuple[int, int]]]] = {}
        self.weights: dict[str, np.ndarray] = {}
        for number, layer in enumerate(self.model.model.layers):
            layer.mlp.experts.forward = self._experts(layer.mlp.experts, number)

    def _experts(self, module: Any, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def one(x: Tensor, token: int, expert: int) -> Tensor:
            readers = {"input": module.gate_up_proj[expert]}

            def passed(name: str, values: Tensor, onto: Tensor) -> Tensor:
                alive = kept(values) if name in self.dropped else values == values
                read = readers.get(name, module.down_proj[expert])
                saved = read[:, values * alive == 0].numel()
                self.weights[name] = self.weights.get(name, 0) + np.array([read.numel(), saved])
                pairs = self.seen.setdefault((layer, name), defaultdict(list))[token]
                pairs.append((expert, int((values * alive == 0).sum())))
                return onto * alive

            own = passed("input", x, x)
            g, u = (module.gate_up_proj[expert] @ own).chunk(2)
            g = module.act_fn(g)
            i = passed("gate", g, passed("up", u, u * g))
            return module.down_proj[expert] @ passed("intermediate", i, i)

        def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for token, experts in enumerate(index.tolist()):
                for place, expert in enumerate(experts):
                    out[token] += weights[token, place] * one(x[token], token, expert)
            return out

        return forward

    @torch.no_grad()
    def run(self, tokens: list[int]) -> Tensor:
        """Logits of the last token."""
        self.seen, self.weights = {}, {}
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]

    def add(self, counts: Counts, phase: str, account: int, places: range) -> None:
        """Count some tokens of the last pass."""
        for (layer, tensor), tokens in self.seen.items():
            sums = counts[phase, layer, tensor]
            for place in places:
                for expert, zeros in tokens[place]:
                    sums[account, :, expert] += (1, zeros)


def expected(
    loop: Loop, requests: list[forest.Request], prompts: list[tuple[int, list[int], list[int]]]
) -> Counts:
    """What is counted, from the requests as they would be run one by one.

    Args:
        loop: runs them.
        requests: that are scored.
        prompts: document, prompt, and what was generated and fed back, of each generation.
    """
    counts: Counts = defaultdict(lambda: np.zeros((2, 2, EXPERTS), np.int64))
    known: set[tuple[int, tuple[int, ...]]] = set()
    for request in requests:
        loop.run(request.run)
        for place in range(len(request.run)):
            if request.counted:
                loop.add(counts, "scoring", 0, range(place, place + 1))
            beginning = request.owner, tuple(request.run[: place + 1])
            if beginning not in known:
                known.add(beginning)
                loop.add(counts, "scoring", 1, range(place, place + 1))
    for document, prompt, fed in prompts:
        loop.run(prompt + fed)
        loop.add(counts, "prompt", 0, range(len(prompt)))
        if (document, tuple(prompt)) not in known:
            known.add((document, tuple(prompt)))
            loop.add(counts, "prompt", 1, range(len(prompt)))
        for account in (0, 1):
            loop.add(counts, "generation", account, range(len(prompt), len(prompt) + len(fed)))
    return counts


def evaluate(
    session: Session, node: Node | None, folder: Path, *, share: bool = True
) -> tuple[CountTable, dict[str, list], dict[str, list]]:
    """Evaluate: the table by expert, and by task the requests and the generations."""
    requests: dict[str, list[forest.Request]] = defaultdict(list)
    prompts: dict[str, list[tuple[int, list[int], list[int]]]] = defaultdict(list)
    pack, generate = forest.pack, session.lm.model.generate

    def spy(some: list[forest.Request], *args: Any, **options: Any) -> list[forest.Batch]:
        requests[session_task[0]] = some
        return pack(some, *args, **options)

    def watched(*args: Any, **options: Any) -> Tensor:
        output = generate(*args, **options)
        ids, mask = options["input_ids"], options["attention_mask"].bool()
        batch = session.lm._replayed
        work = session.prepared(session_task[0]).work
        for row, request in enumerate(work.prompts[batch]):
            prompt = ids[row][mask[row]].tolist()
            made = output[row, ids.shape[1] :].tolist()
            document = work.owners["generate_until"][request]
            prompts[session_task[0]].append((document, prompt, made))
        return output

    session_task = [""]
    original = session.prepared

    def prepared(name: str, **options: Any) -> Any:
        session_task[0] = name
        return original(name, **{**options, "share": share})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "pack", spy)
        # Arranged anew, so that the requests are seen.
        patch.setattr(request_cache.Beside, "read", lambda *_: None)
        patch.setattr(session, "prepared", prepared)
        patch.setattr(session.lm.model, "generate", watched)
        # Whether requests share tokens is asked here, not whether a proof lets them.
        patch.setattr(
            session.lm,
            "_abilities",
            lambda some, branching: Abilities(branches=share, selects=True),
        )
        result = evaluate_node(session, node, folder)
    assert {name: one.get("reason") for name, one in result["tasks"].items()} == dict.fromkeys(
        session.tasks
    )
    return read_table(folder / NAME), requests, prompts


def found(table: CountTable, task: str) -> Counts:
    counts: Counts = defaultdict(lambda: np.zeros((2, 2, EXPERTS), np.int64))
    for row in table.rows[task].to_pylist():
        sums = counts[row["phase"], row["layer"], row["tensor"]]
        for account, prefix in enumerate(("", "unique_")):
            sums[account, :, row["expert"]] = row[f"{prefix}tokens"], row[f"{prefix}zeros"]
    return counts


def cut(made: list[int], until: Callable[[list[int]], bool], end: int) -> list[int]:
    """What of generated tokens was fed back: all before the one that ends the text."""
    for count in range(1, len(made) + 1):
        if made[count - 1] == end or until(made[:count]):
            return made[: count - 1]
    return made[:-1]


@pytest.mark.parametrize("site", ["all_inputs", "gate", None])
def test_as_a_loop_over_tokens_and_experts_counts(
    manifest: Path, mixture: Path, tasks: dict[str, Any], tmp_path: Path, site: str | None
) -> None:
    session = open_session(manifest, tasks)
    node = None if site is None else node_of(site)
    table, requests, prompts = evaluate(session, node, tmp_path / "node")
    dropped = {"all_inputs": ("input", "intermediate"), "gate": ("gate",), None: ()}[site]
    loop = Loop(mixture, dropped)
    stops = GENERATION["generation_kwargs"]["until"]

    def stopped(made: list[int]) -> bool:
        return any(stop in session.lm.tokenizer.decode(made) for stop in stops)

    for task in tasks:
        generations = [
            (document, prompt, cut(made, stopped, session.lm.tokenizer.eos_token_id))
            for document, prompt, made in prompts[task]
        ]
        wanted = expected(loop, requests[task], generations)
        counts = found(table, task)
        tensors = dropped or ("input", "up", "gate", "intermediate")
        phases = ("prompt", "generation") if task == "words" else ("scoring",)
        assert set(counts) == {(p, layer, t) for p in phases for layer in (0, 1) for t in tensors}
        for key, sums in counts.items():
            assert sums.tolist() == wanted[key].tolist(), (task, key)
    generated = found(table, "words")["generation", 0, tensors[0]]
    # Rows of experts that nothing was routed to, and not only such.
    assert 0 < (generated[0, 0] == 0).sum() < EXPERTS
    # Rows ended at different steps, so that some passes fed rows that no longer count.
    assert len({len(fed) for *_, fed in generations}) > 1


def test_entries_are_of_one_expert(manifest: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    evaluate_node(open_session(manifest, tasks), node_of("all_inputs"), tmp_path)
    table = read_table(tmp_path / NAME)
    for rows in table.rows.values():
        for row in rows.to_pylist():
            width = HIDDEN if row["tensor"] == "input" else WIDTH
            for prefix in ("", "unique_"):
                tokens, entries, zeros = (row[f"{prefix}{name}"] for name in COUNTS)
                assert entries == width * tokens
                assert 0 <= zeros <= entries
    assert table.slots == [
        [layer, "experts", tensor, EXPERTS, EACH]
        for layer in (0, 1)
        for tensor in ("input", "intermediate")
    ]


@pytest.mark.parametrize("site", ["all_inputs", "gate"])
def test_a_zero_saves_the_weights_of_its_expert(
    manifest: Path, mixture: Path, tasks: dict[str, Any], tmp_path: Path, site: str
) -> None:
    """Weights that need not be read: those of the experts that a token meets, and of no others."""
    session = open_session(manifest, {"pages": tasks["pages"]})
    _, requests, _ = evaluate(session, node_of(site), tmp_path)
    loop = Loop(mixture, ("input", "intermediate") if site == "all_inputs" else ("gate",))
    by_hand: dict[str, Any] = defaultdict(int)
    for request in requests["pages"]:
        loop.run(request.run)
        for tensor, weights in loop.weights.items():
            by_hand[tensor] += weights
    result = read_manifest(tmp_path / "eval.json")["tasks"]["pages"]["sparsity"]
    assert set(result) == set(loop.dropped)
    for tensor, shares in result.items():
        assert [shares["products"], shares["zero_products"]] == by_hand[tensor].tolist()
        assert shares["zero_products"] > 0


@pytest.mark.parametrize("site", ["all_inputs", "up"])
def test_neither_batches_nor_sharing_change_a_count(
    manifest: Path, tasks: dict[str, Any], tmp_path: Path, site: str
) -> None:
    def rows(batch_size: int, share: bool) -> dict[str, list]:
        session = open_session(manifest, tasks, batch_size=batch_size)
        folder = tmp_path / f"{batch_size}-{share}"
        table, *_ = evaluate(session, node_of(site), folder, share=share)
        batches = session.prepared("choice", share=share).work.batches["loglikelihood"]
        assert any(batch.branched for batch in batches) == share
        padded = [(batch.lengths < batch.tokens.shape[1]).any() for batch in batches]
        assert any(padded) == (batch_size > 1)
        return {task: own.to_pylist() for task, own in table.rows.items()}

    first = rows(4, True)
    assert first["choice"] != []
    for batch_size, share in ((1, True), (16, True), (1, False), (4, False), (16, False)):
        assert rows(batch_size, share) == first, (batch_size, share)


@pytest.mark.parametrize("share", [True, False])
def test_experts_add_up_to_the_sample_table(
    manifest: Path, tasks: dict[str, Any], tmp_path: Path, share: bool
) -> None:
    session = open_session(manifest, tasks)
    table, *_ = evaluate(session, None, tmp_path, share=share)
    header, samples = read_samples(tmp_path / "samples.parquet")
    slots = [(tensor, layer) for tensor, layer, _, *part in header["slots"] if part == ["experts"]]
    places = [i for i, slot in enumerate(header["slots"]) if slot[3:] == ["experts"]]
    for task in tasks:
        own = [row for row in samples.to_pylist() if row["task"] == task]
        counts = found(table, task)
        for phase, account in (("scoring", 0), ("prompt", 0), ("generation", 0), ("unique", 1)):
            phases = ("scoring", "prompt") if phase == "unique" else (phase,)
            if not any(row[f"{phase}_tokens"] for row in own):
                continue
            for (tensor, layer), place in zip(slots, places, strict=True):
                added = sum(counts[one, layer, tensor][account].sum(1) for one in phases)
                # Each of a token's experts reads the same input.
                times = EACH if tensor == "input" else 1
                tokens = sum(row[f"{phase}_tokens"] for row in own)
                zeros = sum(row[f"{phase}_zeros"][place] for row in own)
                assert added.tolist() == [EACH * tokens, times * zeros], (task, phase, tensor)


def test_interrupted_and_resumed(manifest: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    node = node_of("intermediate")
    session = open_session(manifest, tasks)
    whole = watch(session)
    evaluate_node(session, node, tmp_path / "whole")
    files = products(tmp_path / "whole")
    assert sorted(files) == [".lock", "eval.json", NAME, "samples.parquet"]
    for stop in range(1, len(whole), 3):
        session, folder = open_session(manifest, tasks), tmp_path / f"stopped-{stop}"
        watch(session, stop)
        with pytest.raises(Interrupted):
            evaluate_node(session, node, folder)
        session = open_session(manifest, tasks)
        assert len(watched := watch(session)) == 0
        evaluate_node(session, node, folder)
        assert watched == whole[stop:]
        assert products(folder) == files


def test_begun_early_as_on_a_gpu(
    manifest: Path, tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_node(open_session(manifest, tasks), node_of("up"), tmp_path / "whole")
    monkeypatch.setattr(journalled, "AHEAD", {"cpu": 1})
    evaluate_node(open_session(manifest, tasks), node_of("up"), tmp_path / "ahead")
    assert products(tmp_path / "ahead") == products(tmp_path / "whole")


def test_killed_between_the_tables(
    manifest: Path, tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"pages": tasks["pages"]}
    evaluate_node(open_session(manifest, one), node_of("up"), tmp_path / "whole")

    def kill(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(evaluation.Kept, "write", kill)
    with pytest.raises(Interrupted):
        evaluate_node(open_session(manifest, one), node_of("up"), tmp_path / "node")
    monkeypatch.undo()
    session = open_session(manifest, one)
    calls = watch(session)
    evaluate_node(session, node_of("up"), tmp_path / "node")
    assert calls == []  # all of it stood in the journal
    assert products(tmp_path / "node") == products(tmp_path / "whole")


@pytest.mark.parametrize("gone", [NAME, "samples.parquet"])
def test_a_table_that_is_gone_is_made_again(
    manifest: Path, tasks: dict[str, Any], tmp_path: Path, gone: str
) -> None:
    one = {"pages": tasks["pages"]}
    evaluate_node(open_session(manifest, one), node_of("up"), tmp_path)
    files = products(tmp_path)
    (tmp_path / gone).unlink()
    evaluate_node(open_session(manifest, one), node_of("up"), tmp_path)
    assert products(tmp_path) == files


def test_a_dense_model_has_none(
    tmp_path: Path, tasks: dict[str, Any], mixture: Path, manifest: Path
) -> None:
    one = {"pages": tasks["pages"]}
    found = evaluate_node(open_session(manifest, one), node_of("up"), tmp_path / "node")
    assert found["by_expert"] == ["up"]
    dense = write_model_manifest(save_model(tmp_path / "dense"), tmp_path / "model.json")
    # In the folder of a mixture that stood under its name.
    found = evaluate_node(open_session(dense, one), node_of("up"), tmp_path / "node")
    assert "by_expert" not in found
    assert sorted(products(tmp_path / "node")) == [".lock", "eval.json", "samples.parquet"]


def test_what_failed_is_known_to_have_failed(manifest: Path, tmp_path: Path) -> None:
    tasks = {"none": write_task(tmp_path / "tasks", "none", [], **CHOICE)}
    evaluate_node(open_session(manifest, tasks), node_of("up"), tmp_path / "node")
    table = read_table(tmp_path / "node" / NAME)
    assert list(table.tasks) == ["none"]
    assert len(table.rows["none"]) == 0


def test_doctor_and_clean_know_the_table(
    manifest: Path, tasks: dict[str, Any], tmp_path: Path
) -> None:
    one = {"pages": tasks["pages"]}
    node = tmp_path / "results/tiny/topp/up/0.8"
    evaluate_node(open_session(manifest, one), node_of("up"), node)

    def problems() -> list[str]:
        return [found.problem for found in examine(tmp_path / "results") if found.problem]

    assert problems() == []
    content = (node / NAME).read_bytes()
    (node / NAME).unlink()
    assert problems() == ["experts.parquet has not the 'pages' that eval.json tells of"]
    (node / NAME).write_bytes(content[:-9] + b"x" + content[-8:])
    (problem,) = problems()
    assert problem.startswith("experts.parquet: damaged table")
    (node / NAME).write_bytes(content)
    config = parse(
        {
            "models": {"other": {"path": "other"}},
            "criteria": {"topp": {}},
            "texts": {"prose": {"file": "prose.jsonl"}},
            "tasks": {"pages": {}},
            "run": [{"models": ["other"], "criteria": ["topp"], "sites": ["up"]}],
        }
    )
    assert not list(orphans(tmp_path / "results", config))
    (node / "eval.json").unlink()
    gone = {one.path.name for one in orphans(tmp_path / "results", config)}
    assert gone == {NAME, "samples.parquet"}
