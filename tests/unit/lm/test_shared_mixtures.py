"""Mixtures of experts share what requests have in common, and batch size changes nothing but rounding."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixtures import EACH, VOCABULARY, WIDE, routing, tiny_mixture, wide_mixture
from sparsity_atlas.criteria import create
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.lm import forward, sharing
from sparsity_atlas.lm.forest import Request, pack
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.lm.sharing import abilities
from sparsity_atlas.sites.experts import routing as module_of_routing
from sparsity_atlas.sites.experts.experts_modules import experts_modules
from sparsity_atlas.sites.experts.routing import recorded, repeated
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sparsify.attach import counted, sparsified
from sparsity_atlas.terms import ACCOUNTS
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    ROLLING,
    choice_documents,
    letter_documents,
    open_session,
    rolling_documents,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ABLE = Abilities(branches=True, selects=True)
LEAKS = "a branch depends on its neighbour"


def questions(count: int = 8, longest: int = 60) -> list[Request]:
    """Contexts with two to four options each, of several tokens."""
    draw = random.Random(0)

    def tokens(shortest: int, most: int) -> list[int]:
        return draw.choices(range(3, VOCABULARY), k=draw.randint(shortest, most))

    requests = []
    for owner in range(count):
        context = tokens(20, longest)
        for _ in range(draw.randint(2, 4)):
            option = tokens(1, 5)
            requests.append(Request(context + option, len(option), owner))
    return requests


@pytest.mark.parametrize(
    ("hidden", "dtype"), [(128, torch.float32), (256, torch.float32), (128, torch.bfloat16)]
)
@pytest.mark.parametrize("family", WIDE)
def test_mixtures_are_proved_to_share(family: str, hidden: int, dtype: torch.dtype) -> None:
    model = wide_mixture(family, hidden, dtype)
    before = model.get_experts_implementation()
    assert abilities(model, questions()) == (ABLE, {})
    assert model.get_experts_implementation() == before


def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave each pass of the proof to its own routing."""
    monkeypatch.setattr(sharing, "recorded", lambda model: recorded(nn.Identity()))
    monkeypatch.setattr(sharing, "repeated", lambda *_: recorded(nn.Identity()))


def test_bits_follow_the_size_of_an_expert_s_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would not see if no model had it."""
    free(monkeypatch)
    found = [abilities(wide_mixture(family, 256), questions())[1] for family in WIDE]
    assert {"branches": LEAKS} in found


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_a_tie_of_two_experts_hides_nothing_and_refuses_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experts whose scores differ by rounding alone: a token goes to one here, to the other there."""
    model = wide_mixture(family, 256)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[1] = gate[0] + 1e-8 * torch.randn(gate.shape[1])
    assert abilities(model, questions()) == (ABLE, {})
    free(monkeypatch)
    assert abilities(model, questions())[0] == Abilities(selects=True)


def _embedding(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Each token also sees the one before it in its row, too faintly for its logits to show it."""
    inner = model.model.embed_tokens.forward

    def leaking(ids: Tensor) -> Tensor:
        embedded = inner(ids)
        before = nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return embedded + 1e-6 * before

    patch.setattr(model.model.embed_tokens, "forward", leaking)


def _router(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A router weighs experts by what the whole row holds, faintly."""
    gate = model.model.layers[1].mlp.gate
    inner = gate.forward
    patch.setattr(gate, "forward", lambda x: inner(x + 1e-6 * x.roll(1, 0)))


def _capacity(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Experts take so many tokens; what comes later is lost."""
    gate = model.model.layers[1].mlp.gate
    inner = gate.forward

    def limited(x: Tensor) -> Any:
        logits, weights, index = inner(x)
        chosen = nn.functional.one_hot(index, 8).sum(1)
        late = chosen.cumsum(0).gather(1, index) > x.shape[0] // 5
        return logits, weights.masked_fill(late, 0), index

    patch.setattr(gate, "forward", limited)


def _experts(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Experts mix the rows that they get."""
    block = model.model.layers[1].mlp
    inner = block.forward
    patch.setattr(block, "forward", lambda x: inner(x) + 1e-6 * inner(x).roll(1, 1))


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
@pytest.mark.parametrize("leak", [_embedding, _router, _capacity, _experts])
def test_a_mixture_that_leaks_is_refused(
    leak: Callable[[Any, pytest.MonkeyPatch], None], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide_mixture(family)
    leak(model, monkeypatch)
    found, faults = abilities(model, questions())
    assert not found.branches
    assert faults["branches"] == LEAKS or "relative error" in faults["branches"]


def run(
    model: nn.Module, requests: list[Request], attach: Any, size: int, *, share: bool
) -> tuple[list[tuple[float, bool]], dict[int, Any]]:
    """Answers by request, and zeros [slots] by document."""
    answers: list[Any] = [None] * len(requests)
    every: dict[int, Any] = {}
    with attach() as counter, torch.no_grad():
        for batch in pack(requests, size, share=share):
            valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
            counter.expect(torch.from_numpy(valid))
            pieces = forward.logits(
                model, lambda ids, **o: model(ids, **o).logits, batch, select=True
            )
            zeros, _ = counter.take()
            counts = forward.zeros_by_document(zeros, batch)()[0].tolist()
            for owner, own in zip(batch.documents, counts, strict=True):
                every[owner] = every.get(owner, 0) + np.array(own)
            scores = zip(batch.requests, *forward.scores(pieces, batch)(), strict=True)
            for number, *answer in scores:
                answers[number] = tuple(answer)
    return answers, {owner: zeros.tolist() for owner, zeros in every.items()}


@pytest.mark.parametrize("family", WIDE)
def test_scores_and_counts_are_those_of_each_request_by_itself(family: str) -> None:
    model = wide_mixture(family)
    parts, requests = find_parts(model), questions()
    ways: list[Any] = [lambda: counted(model, parts)]
    ways += [
        lambda site=site, rule=rule, level=level: sparsified(
            model, parts, site, create({"rule": rule}), level
        )
        for site, rule, level in (
            *(("intermediate", "topp", 0.8), ("all_inputs", "topk", 0.5)),
            ("gate", "maxp", 0.1),
        )
    ]
    for attach in ways:
        plain = run(model, requests, attach, 1, share=False)
        for size, share in ((4, False), (1, True), (4, True)):
            found = run(model, requests, attach, size, share=share)
            for (one, greedy), (other, likewise) in zip(plain[0], found[0], strict=True):
                assert one == pytest.approx(other, abs=1e-4)
                assert greedy == likewise
            assert plain[1] == found[1]


@pytest.fixture(scope="module", params=["olmoe", "qwen2_moe"])
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    model = wide_mixture(request.param, vocab_size=300, max_position_embeddings=48)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return write_model_manifest(folder, folder.parent / "model.json")


@pytest.mark.parametrize("node", [None, ("intermediate", "0.7"), ("all_inputs", "0.9")])
def test_batch_size_changes_no_accuracy_and_no_count(
    manifest: Path, tmp_path: Path, node: tuple[str, str] | None
) -> None:
    tasks = {
        "choice": write_task(tmp_path, "choice", choice_documents(), **CHOICE),
        "letters": write_task(tmp_path, "letters", letter_documents(), **CHOICE),
        "rolling": write_task(tmp_path, "rolling", rolling_documents(), **ROLLING),
        "last": write_task(tmp_path, "last", rolling_documents(9, 3), **LAST_WORD),
        "words": write_task(tmp_path, "words", rolling_documents(9, 4), **GENERATION),
    }
    made = None if node is None else Node.make({"rule": "topp"}, *node)
    results, tables = [], []
    for size in (1, 4, 16):
        session = open_session(manifest, tasks, batch_size=size)
        # Sums of float32 depend on how many rows a product has, in each CPU's own way, and of 650,000 entries
        # some lie so near a threshold that this decides.
        session.lm.model.double()
        results.append(evaluate_node(session, made, tmp_path / str(size))["tasks"])
        assert session.prepared("choice").work.abilities.branches
        tables.append(read_table(tmp_path / str(size) / "samples.parquet")[1].to_pylist())
    for name in tasks:
        one, *others = (result[name] for result in results)
        for many in others:
            assert one["sparsity"] == many["sparsity"]
            assert one["tokens"] == many["tokens"]
            for leaf, scores in one["scores"].items():
                for key, value in scores.items():
                    exact = key.startswith(("acc", "exact_match"))
                    tolerance = 0 if exact else 1e-4
                    assert many["scores"][leaf][key] == pytest.approx(value, rel=tolerance, abs=0)
    for one, *others in zip(*tables, strict=True):
        for many in others:
            assert one["nats"] == pytest.approx(many["nats"], abs=1e-4)
            for account in ACCOUNTS:
                assert one[f"{account}_zeros"] == many[f"{account}_zeros"]
                assert one[f"{account}_tokens"] == many[f"{account}_tokens"]


# Routing


def test_a_mistake_of_ours_is_no_refusal_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_mixture("olmoe")

    def refusing(*args: Any, **named: Any) -> Any:
        raise TypeError("no such mask")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", refusing)
        _, faults = abilities(model, questions())
        assert faults["branches"] == "TypeError: no such mask"
    monkeypatch.setattr(module_of_routing, "_places", lambda: None)
    with pytest.raises(TypeError, match="takes 0 positional arguments"):
        abilities(model, questions())


def test_a_routing_is_noted_and_repeated() -> None:
    model: Any = tiny_mixture("olmoe")
    ids, other = torch.randint(3, 90, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    where = torch.tensor([True, False] * 8)
    with torch.no_grad():
        with recorded(model) as first:
            model(ids)
        with recorded(model) as alone:
            model(other)
        with repeated(model, first, where), recorded(model) as sent:
            model(other)
    assert first.keys() == alone.keys() == sent.keys() == experts_modules(model).keys()
    first_layer = next(iter(first))
    assert not torch.equal(first[first_layer], alone[first_layer])
    for path, index in sent.items():
        assert torch.equal(index[where], first[path][where])
    # What goes into the first layer's router is not changed by where its experts' tokens go.
    assert torch.equal(sent[first_layer][~where], alone[first_layer][~where])


def test_experts_keep_their_weights_where_tokens_are_sent() -> None:
    seen: dict[str, Tensor] = {}

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = tiny_mixture("olmoe").model.layers[0].mlp.experts  # type: ignore[union-attr,index]

    model = Alone()
    model.experts.register_forward_hook(
        lambda module, args, output: seen.update(index=args[1], weights=args[2])
    )
    x, _, _ = routing(4)
    index = torch.tensor([[0, 1], [0, 1], [2, 3], [0, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.7, 0.3], [0.6, 0.4]])
    wanted = torch.tensor([[1, 0], [2, 0], [0, 1], [3, 2]])
    with repeated(model, {"experts": wanted}, torch.tensor([True, True, True, False])):
        model.experts(x, index, top_k_weights=weights)
    assert seen["index"].tolist() == [[1, 0], [2, 0], [0, 1], [0, 1]]
    expected = torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.7, 0.3], [0.6, 0.4]])
    assert torch.equal(seen["weights"], expected)
    assert index.shape[1] == EACH


def test_a_dense_model_has_no_routing() -> None:
    with recorded(nn.Linear(2, 2)) as seen, repeated(nn.Linear(2, 2), seen, torch.zeros(1)):
        pass
    assert seen == {}
