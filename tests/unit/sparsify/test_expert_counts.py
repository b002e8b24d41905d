"""Sums by expert of rows that are tokens, and of rows that are pairs of a token and an expert."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtures import EACH, EXPERTS, routing
from sparsity_atlas.sites.experts.grouping import group
from sparsity_atlas.sites.experts.mixture import RoutedVectors
from sparsity_atlas.sites.part import Routing
from sparsity_atlas.sparsify.attach import Counter
from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.sparsify.expert_counts import ByExpert
from sparsity_atlas.terms import PlaceKey

BATCH, TOKENS, WIDTH = 3, 5, 8


def part(*, of_tokens: bool) -> Any:
    return SimpleNamespace(layer=0, name="experts", rows_are_tokens=lambda tensor: of_tokens)


def slot(tensor: str) -> Slot:
    return Slot(PlaceKey(0, "experts", tensor), EACH * WIDTH, 4, Routing(EXPERTS, EACH, WIDTH))


def vectors(tensor: str, index: Tensor, *, grouped: bool) -> tuple[RoutedVectors, Tensor]:
    """A tensor's rows, and a number of zeros for each of them."""
    shape = (index.numel(),) if grouped else (BATCH, TOKENS)
    zeros = torch.randint(0, WIDTH, shape, generator=torch.Generator().manual_seed(3))
    values = torch.zeros(*shape, WIDTH)
    own = part(of_tokens=not grouped)
    return RoutedVectors(own, tensor, values, group(index, EXPERTS), (BATCH, TOKENS)), zeros


@pytest.mark.parametrize(
    ("tensor", "grouped"), [("intermediate", True), ("input", False), ("input", True)]
)
def test_sums_are_those_of_a_loop(tensor: str, grouped: bool) -> None:
    """Also where the input's rows are those of experts, as rules need that differ by expert."""
    _, index, _ = routing(BATCH * TOKENS)
    rows, zeros = vectors(tensor, index, grouped=grouped)
    times = torch.randint(0, 4, (2, BATCH, TOKENS), generator=torch.Generator().manual_seed(4))
    by_expert = ByExpert([slot(tensor)])
    by_expert.begin(times)
    by_expert.add(rows, zeros, later=False)
    wanted = torch.zeros(2, 3, EXPERTS, dtype=torch.int64)
    grouping = rows.grouping
    for account in (0, 1):
        for token, experts in enumerate(index.tolist()):
            weight = times[account].flatten()[token]
            for expert in experts:
                if grouped:
                    mine = (grouping.tokens == token) & (grouping.experts == expert)
                    count = zeros[mine].item()
                else:
                    count = zeros.flatten()[token]
                wanted[0, account, expert] += weight * count
                wanted[1, account, expert] += weight
    (sums,) = by_expert.take()
    assert torch.equal(sums, wanted)


def test_later_passes_have_an_account_of_their_own() -> None:
    _, index, _ = routing(BATCH)
    grouping = group(index, EXPERTS)
    own = part(of_tokens=False)
    rows = RoutedVectors(own, "up", torch.zeros(BATCH * EACH, WIDTH), grouping, (BATCH, 1))
    by_expert = ByExpert([slot("up")])
    by_expert.begin(torch.ones(1, BATCH, 1, dtype=torch.int64))
    ones = torch.ones(BATCH * EACH, dtype=torch.int32)
    by_expert.add(rows, ones, later=False)
    by_expert.follow(torch.tensor([1, 0, 1]))
    by_expert.add(rows, ones, later=True)
    by_expert.follow(None)
    by_expert.add(rows, ones, later=True)
    (sums,) = by_expert.take()
    once = torch.bincount(index.flatten(), minlength=EXPERTS)
    without = torch.bincount(index[[0, 2]].flatten(), minlength=EXPERTS)
    for row in sums:
        assert torch.equal(row, torch.stack([once, without + once]))


def test_of_slots_without_experts_nothing_is_counted() -> None:
    counter = Counter([Slot(PlaceKey(0, "ffn", "up"), 8, 8)])
    counter.expect(torch.ones(2, 2, dtype=torch.bool))
    assert counter.by_expert.take() == []
