"""Tokens that requests share are run once where a model can do it: the same scores, the same zeros."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsity_atlas import scoring
from sparsity_atlas.criteria import create
from sparsity_atlas.forest import Request, pack
from sparsity_atlas.scoring import Abilities
from sparsity_atlas.sharing import abilities
from sparsity_atlas.sites import find_ffns
from sparsity_atlas.sparsify import counted, sparsified
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

# No place for a mask of who sees whom or for positions, or a state that follows the row.
UNABLE = {"bloom", "mpt", "rwkv", "openai-gpt", "lfm2", "recurrent_gemma"}


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
            logits = scoring.logits(
                model, lambda ids, **o: model(ids, **o).logits, batch, select=found.selects
            )
            zeros, _ = counter.take()
            for sums, part in zip(
                (every, once), scoring.zeros_by_document(zeros, batch), strict=True
            ):
                for owner, counts in zip(batch.documents, part, strict=True):
                    sums[owner] = sums.get(owner, 0) + np.array(counts)
            for number, *answer in zip(batch.requests, *scoring.scores(logits, batch), strict=True):
                answers[number] = tuple(answer)
    return answers, every, once


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_models_can(name: str) -> None:
    found = abilities(tiny_model(name), questions())
    assert found.branches == (name not in UNABLE)
    assert found.selects


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - UNABLE))
def test_scores_and_counts_are_those_of_each_request_by_itself(name: str) -> None:
    model = tiny_model(name)
    requests = questions()
    ffns = find_ffns(model)
    ways = {"dense": lambda: counted(model, ffns)}
    for site in ffns[0].sites():
        for rule, level in (("topp", 0.7), ("topk", 0.4), ("maxp", 0.2)):
            ways[f"{rule} {site}"] = lambda site=site, rule=rule, level=level: sparsified(
                model, ffns, site, create({"rule": rule}), level
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
