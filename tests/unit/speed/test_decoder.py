"""A decoder gives the tokens that a model gives without a cache, for as long as there is room."""

from __future__ import annotations

import pytest
import torch

from sparsity_atlas.sites.find import random_ids
from sparsity_atlas.speed.decoder import STEPS, Decoder
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens(rows: int) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    ids = random_ids(model, (rows, 7))
    decoder = Decoder(model, rows, 40)
    found = [decoder.prompt(ids)[None], decoder.go_on(20), decoder.go_on(3)]
    for _ in range(24):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(found).T, ids[:, 7:])


def test_times_are_of_one_step_and_of_the_tokens_that_follow() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    ids = random_ids(model, (2, 7))
    texts = []
    for rounds in (0, 3):
        decoder = Decoder(model, 2, 7 + STEPS)
        decoder.prompt(ids)
        if rounds:
            took = decoder.timed(8, rounds)
            assert took.median > 0
            assert took.spread >= 0
        texts.append(decoder.go_on(STEPS))
    assert torch.equal(*texts)
