"""Tokens that requests share are run once where a model can do it: the same scores, the same zeros."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plain_lm import assert_same, plainly, through_atlas
from small_configs import small_config
from sparsity_atlas.criteria import create
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.lm import forward
from sparsity_atlas.lm.answers import Answers
from sparsity_atlas.lm.forest import Request, pack
from sparsity_atlas.lm.forward import LAYER_TYPES, Abilities, Masks
from sparsity_atlas.lm.sharing import abilities, round_up
from sparsity_atlas.models import memory
from sparsity_atlas.sites.find import find_parts, sites_of
from sparsity_atlas.sparsify.attach import NumericalFailure, counted, sparsified
from tiny_lm import (
    CHOICE,
    choice_documents,
    open_session,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

# No place for a mask of who sees whom or for positions, or a state that follows the row.
UNABLE = {"bloom", "mpt", "rwkv", "openai-gpt", "lfm2", "recurrent_gemma"}


@pytest.mark.parametrize(
    ("length", "least", "window", "wanted"),
    [
        *((9, 64, None, 64), (65, 64, None, 96), (97, 64, None, 128), (129, 64, None, 192)),
        *((9, 512, None, 512), (513, 512, None, 768), (800, 512, None, 1024)),
        *((9, 512, 100, 100), (100, 512, 100, 100), (101, 64, 100, 128), (97, 64, 4096, 128)),
    ],
)
def test_a_sample_is_longer_than_its_request_but_not_than_a_window_that_holds_it(
    length: int, least: int, window: int | None, wanted: int
) -> None:
    assert round_up(length, least, window) == wanted


def questions(count: int = 6, seed: int = 0, longest: int = 14) -> list[Request]:
    """Contexts with two to four options each, of several tokens."""
    draw = random.Random(seed)

    def tokens(shortest: int, most: int) -> list[int]:
        return draw.choices(range(3, VOCABULARY), k=draw.randint(shortest, most))

    requests = []
    for owner in range(count):
        context = tokens(4, longest)
        for _ in range(draw.randint(2, 4)):
            option = tokens(1, 5)
            requests.append(Request(context + option, len(option), owner))
    return requests


def run(
    model: nn.Module, requests: list[Request], found: Abilities, attach: Any
) -> tuple[list[tuple[float, bool]], dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Answers by request, and zeros [slots] by document: as often as asked for, and once."""
    answers: list[Any] = [None] * len(requests)
    every: dict[int, Any] = {}
    once: dict[int, Any] = {}
    with attach() as counter, torch.no_grad():
        for batch in pack(requests, 3, share=found.branches):
            valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
            counter.expect(torch.from_numpy(valid))
            pieces = forward.logits(
                model,
                lambda ids, **o: model(ids, **o).logits,
                batch,
                select=found.selects,
                masks=found.masks,
            )
            zeros, _ = counter.take()
            for sums, part in zip(
                (every, once), forward.zeros_by_document(zeros, batch)(), strict=True
            ):
                for owner, counts in zip(batch.documents, part, strict=True):
                    sums[owner] = sums.get(owner, 0) + np.array(counts)
            for number, *answer in zip(
                batch.requests, *forward.scores(pieces, batch)(), strict=True
            ):
                answers[number] = tuple(answer)
    return answers, every, once


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_models_can(name: str) -> None:
    found, faults = abilities(tiny_model(name), questions())
    assert found == Abilities(branches=name not in UNABLE, selects=True)
    assert ("branches" in faults) == (name in UNABLE)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - UNABLE))
def test_scores_and_counts_are_those_of_each_request_by_itself(name: str) -> None:
    model = tiny_model(name)
    requests = questions()
    parts = find_parts(model)
    ways = {"dense": lambda: counted(model, parts)}
    for site in sites_of(parts):
        for rule, level in (("topp", 0.7), ("topk", 0.4), ("maxp", 0.2)):
            ways[f"{rule} {site}"] = lambda site=site, rule=rule, level=level: sparsified(
                model, parts, site, create({"rule": rule}), level
            )
    for attach in ways.values():
        plain = run(model, requests, Abilities(), attach)
        shared = run(model, requests, Abilities(branches=True, selects=True), attach)
        for (one, greedy), (other, likewise) in zip(plain[0], shared[0], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
            assert greedy == likewise
        for before, after in zip(plain[1:], shared[1:], strict=True):
            assert {k: v.tolist() for k, v in before.items()} == {
                k: v.tolist() for k, v in after.items()
            }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", *sorted(UNABLE)])
def test_rounding_hides_no_mistake(name: str, dtype: torch.dtype) -> None:
    # Weights so small as the default ones round every trace of a neighbour away.
    found, _ = abilities(tiny_model(name, dtype=dtype, initializer_range=0.2), questions())
    assert found == Abilities(branches=name not in UNABLE, selects=True)


WINDOWED = {
    "mistral": ("mistral", {}, Masks.WINDOWED),
    "gemma3": (
        *("gemma3", {"layer_types": ["sliding_attention", "full_attention"]}),
        Masks.BY_LAYER,
    ),
    "gemma3-sliding": ("gemma3", {"layer_types": ["sliding_attention"] * 2}, Masks.WINDOWED),
    "gemma2": ("gemma2", {}, Masks.BY_LAYER),
    "starcoder2": ("starcoder2", {}, Masks.WINDOWED),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [6, 64])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_of_attention(name: str, window: int, dtype: torch.dtype) -> None:
    model_type, settings, masks = WINDOWED[name]
    model = tiny_model(model_type, dtype, sliding_window=window, initializer_range=0.2, **settings)
    requests = questions()
    # Requests on both sides of the shorter window.
    lengths = sorted(len(request.run) for request in requests)
    assert lengths[0] < 6 < lengths[-1] < 64
    found, faults = abilities(model, requests)
    expected = masks if window == 6 else Masks.ONE
    assert found == Abilities(branches=True, selects=True, masks=expected), faults
    parts = find_parts(model)
    if dtype == torch.float32:
        plain, shared = (
            run(model, requests, able, lambda: counted(model, parts))
            for able in (Abilities(), found)
        )
        for (one, greedy), (other, likewise) in zip(plain[0], shared[0], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
            assert greedy == likewise


@pytest.mark.parametrize("layers", [["chunked", "full"], ["chunked", "chunked"]])
@pytest.mark.parametrize("chunk", [6, 64])
def test_chunks_of_attention(chunk: int, layers: list[str]) -> None:
    """As in Llama 4: beyond the beginning of its piece of a sequence a token sees nothing."""
    settings = {
        **{"attention_chunk_size": chunk, "num_local_experts": 2, "intermediate_size_mlp": 40},
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"layer_types": [f"{one}_attention" for one in layers], "initializer_range": 0.2},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", max_position_embeddings=64, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    requests = questions()
    found, faults = abilities(model, requests)
    masks = Masks.BY_LAYER if chunk == 6 else Masks.ONE
    assert found == Abilities(branches=True, selects=True, masks=masks), faults
    parts = find_parts(model)
    alone, shared = (
        [one for one, _ in run(model, requests, able, lambda: counted(model, parts))[0]]
        for able in (Abilities(), found)
    )
    assert shared == pytest.approx(alone, abs=1e-4)


def test_a_window_changes_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
    model = tiny_model("gemma3", vocab_size=300, initializer_range=0.3, **settings)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = write_model_manifest(tmp_path / "model", tmp_path / "model.json")
    documents = choice_documents()
    documents[0]["context"] = "the"
    entry = write_task(tmp_path / "tasks", "choice", documents, **CHOICE)
    session = open_session(path, {"choice": entry})
    outcome = through_atlas(session, None, tmp_path / "dense", monkeypatch)["choice"]
    assert session.prepared("choice").work.abilities.masks is Masks.BY_LAYER
    lengths = [
        leaf
        for batch in session.prepared("choice").work.batches["loglikelihood"]
        for leaf in batch.run
    ]
    assert min(lengths) < 12 < max(lengths)
    assert_same(outcome, plainly(session, "choice", tmp_path / "tasks", 4))


@pytest.mark.parametrize("window", [6, 256])
def test_a_window_that_the_model_keeps_to_itself(window: int) -> None:
    config = AutoConfig.for_model(
        *("gpt_neo",),
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2},
        **{"attention_types": [[["global", "local"], 1]], "window_size": window},
        **{"max_position_embeddings": 256, "initializer_range": 0.2},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found, faults = abilities(model, questions())
    assert found.branches == (window == 256), faults
    assert ("relative error" in faults.get("branches", "")) == (window == 6)


@pytest.mark.parametrize("window", [6, 64])
@pytest.mark.parametrize("kind", ["recurrent_gemma", "minimax", "lfm3"])
def test_windows_beside_a_state_that_follows_the_row(kind: str, window: int) -> None:
    config = small_config(kind)
    assert not set(config.layer_types) <= set(LAYER_TYPES)
    config.sliding_window, config.initializer_range = window, 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found, faults = abilities(model, questions())
    assert found == Abilities(selects=True)
    assert faults["branches"].startswith("relative error")


def test_requests_that_share_nothing_need_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tokens = 0

    def watch(module: nn.Module, arguments: tuple) -> None:
        nonlocal tokens
        tokens += arguments[0].numel()

    model.model.embed_tokens.register_forward_pre_hook(watch)
    assert abilities(model, questions(longest=40), branching=False)[0] == Abilities(selects=True)
    assert tokens <= 2 * 2 * 24


def test_no_logits_of_a_long_sample_are_made() -> None:
    model = tiny_model("llama")
    shapes = []
    model.lm_head.register_forward_hook(lambda head, args, output: shapes.append(output.shape))
    assert abilities(model, questions(longest=60))[0].branches
    assert max(shape[:-1].numel() for shape in shapes) <= 2 * 24


def test_answers_are_kept_with_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model("mistral", sliding_window=30)
    calls = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.append(1))

    def ask(longest: int, **made_of: str) -> Abilities:
        calls.clear()
        answers = Answers({"model": "a", **made_of})
        return abilities(model, questions(longest=longest), answers=answers)[0]

    first = ask(20)
    assert calls
    assert first.masks is Masks.ONE
    assert ask(20) == ask(10) == first
    assert not calls
    # A longer request is another question, and so is another model.
    assert ask(60).masks is Masks.WINDOWED
    assert calls
    assert ask(60).masks is Masks.WINDOWED
    assert not calls
    assert ask(20) == first
    assert not calls
    assert ask(20, device="other") == first
    assert calls
    for path in (tmp_path / "sparsity-atlas" / "abilities").iterdir():
        path.write_text(path.read_text().replace("windowed", "one"))
    assert ask(60).masks is Masks.WINDOWED
    assert calls


def test_a_proof_of_longer_requests_serves_more_tasks() -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    answers = Answers()
    longest = max(len(request.run) for request in questions(longest=80))
    abilities(model, questions(longest=80), answers=answers, most=512)
    assert [proof.length for proof in answers.proofs] == [96]
    assert longest < 96
    # Not beyond what the model may run.
    answers = Answers()
    abilities(model, questions(longest=80), answers=answers, most=longest + 1)
    assert [proof.length for proof in answers.proofs] == [longest + 1]


def test_other_attention() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert abilities(model, questions())[0] == Abilities(branches=True, selects=True)


def test_a_trace_of_a_neighbour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token also sees the one before it in its row, too faintly for its logits to show it."""
    model = tiny_model("llama")
    inner = model.model.embed_tokens.forward

    def leaking(ids: torch.Tensor) -> torch.Tensor:
        embedded = inner(ids)
        before = nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return embedded + 1e-5 * before

    monkeypatch.setattr(model.model.embed_tokens, "forward", leaking)
    found, faults = abilities(model, questions())
    assert not found.branches
    assert faults["branches"] == "a branch depends on its neighbour"


def test_a_head_that_must_see_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    shapes = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: shapes.append(args[0].shape)
    )
    inner = model.lm_head.forward

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:2] != shapes[-1]:
            raise ValueError("a whole batch is wanted")
        return inner(hidden)

    monkeypatch.setattr(model.lm_head, "forward", whole)
    found, faults = abilities(model, questions())
    assert found == Abilities(branches=True, selects=False)
    assert faults == {"selects": "ValueError: a whole batch is wanted"}


def test_what_takes_longer_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=300, hidden_size=24, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    path = write_model_manifest(tmp_path / "bloom", tmp_path / "model.json")
    tasks = {
        name: write_task(tmp_path / "tasks", name, choice_documents(seed=seed), **CHOICE)
        for seed, name in enumerate(("one", "two"))
    }
    with caplog.at_level("INFO", "sparsity_atlas"):
        result = evaluate_node(open_session(path, tasks), None, tmp_path / "dense")
    assert result["status"] == "ok"
    assert caplog.text.count("each answer option reads its whole context") == 1


@pytest.mark.parametrize("select", [True, False])
def test_logits_of_scored_tokens_only(select: bool) -> None:
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    shapes = []
    model.lm_head.register_forward_hook(lambda head, args, output: shapes.append(output.shape))
    (batch,) = pack(questions(1), 8, share=True)
    with torch.no_grad():
        pieces = forward.logits(
            model, lambda ids, **o: model(ids, **o).logits, batch, select=select
        )
        found = torch.cat(list(pieces))
    assert found.shape == (len(batch.scored), VOCABULARY)
    assert shapes == [(1, *found.shape) if select else (*batch.tokens.shape, VOCABULARY)]
    # What the model does behind its head is done all the same.
    assert found.abs().max() < 2


@pytest.mark.parametrize("rows", [1, 7, 10**6])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 10**9])
def test_scores_in_chunks(chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.CHUNK, "cpu", chunk)
    requests = questions()
    for batch in pack(requests, 2, share=True):
        generator = torch.Generator().manual_seed(len(batch.scored))
        found = torch.randn(len(batch.scored), VOCABULARY, generator=generator)
        # A tie: the first of the likeliest tokens is the one that greedy decoding takes.
        found[:, 5] = found[:, 4] = found.amax(-1) + 1
        likely = found.log_softmax(-1)
        sums, greedy = forward.scores(found.split(rows), batch)()
        ends = [*batch.firsts[1:], len(batch.row)]
        for i, (first, end) in enumerate(zip(batch.firsts, ends, strict=True)):
            row, target = batch.row[first:end], batch.targets[first:end]
            assert sums[i] == pytest.approx(likely[row, target].sum().item(), abs=1e-4)
            assert greedy[i] == (found[row].argmax(-1).numpy() == target).all()


def test_nan_in_the_logits_is_a_failure() -> None:
    (batch,) = pack(questions(1), 8, share=True)
    found = torch.zeros(len(batch.scored), VOCABULARY)
    found[3, 7] = float("nan")
    with pytest.raises(NumericalFailure, match="in the logits"):
        forward.scores([found], batch)()
