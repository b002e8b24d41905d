"""Masks over a text are those of the simulated criterion; levels are found that drop what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixtures import tiny_mixture
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.sites.find import find_parts, random_ids
from sparsity_atlas.sparsify.attach import applied
from sparsity_atlas.speed.text_vectors import NEAR, Levels, Seen, Text
from sparsity_atlas.terms import SITES, PlaceKey
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("site", SITES)
def test_zeros_are_those_that_an_evaluation_counts(site: str) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parts, ids = find_parts(model), random_ids(model, (3, 8))
    bound = bind_all(create({"rule": "topp"}), parts, site)
    seen = Text(parts, site, bound, ids).seen(0.6)
    with torch.no_grad(), applied(model, parts, site, bound, 0.6) as counter:
        counter.expect(torch.ones_like(ids, dtype=torch.bool))
        model(ids)
        zeros = counter.take()[0]
    assert list(seen.kept) == [slot.key for slot in counter.slots]
    for place, counted in zip(seen.kept, zeros, strict=True):
        assert int((~seen.kept[place]).sum()) == int(counted.sum())
        assert seen.vectors[place].shape == seen.kept[place].shape


def test_vectors_of_experts_are_sparsified_and_not_kept() -> None:
    model = tiny_mixture("qwen2_moe")
    parts, ids = find_parts(model), random_ids(model, (2, 6))
    bound = bind_all(create({"rule": "topp"}), parts, "intermediate")
    seen = Text(parts, "intermediate", bound, ids).seen(0.5)
    assert {place.part for place in bound} > {place.part for place in seen.kept}


def test_groups_are_of_tokens_far_apart() -> None:
    model = tiny_model("llama")
    parts = find_parts(model)
    text = Text(parts, "input", {}, random_ids(model, (4, 8)))
    for size in (1, 4, 16):
        groups = text.groups(size)
        assert all(len(one) == size for one in groups)
        tokens = torch.cat(groups)
        assert len(tokens.unique()) == len(tokens)
        assert tokens.max() < text.tokens
        assert all((one.diff() == text.tokens // size).all() for one in groups)


class FakeText:
    """A text of which each level drops what a function says; it counts its runs."""

    def __init__(self, share: Callable[[float], float]) -> None:
        self.share, self.runs = share, 0

    def seen(self, level: float) -> Any:
        self.runs += 1
        kept = torch.ones(10_000, dtype=torch.bool)
        kept[: round(self.share(level) * 10_000)] = False
        return Seen(level, {}, {PlaceKey(0, "ffn", "input"): kept})


@pytest.mark.parametrize(
    ("share", "dense", "harshest"),
    [
        (lambda level: (1 - level) ** 0.5, 1.0, 0.0),  # as top-p
        (lambda level: level**3, 0.0, 1.0),
        (lambda level: 1 - 2.718 ** (-level * 50), 0.0, 1e4),  # thresholds far from their upper end
    ],
)
def test_levels_are_found_without_a_curve(
    share: Callable[[float], float], dense: float, harshest: float
) -> None:
    text = FakeText(share)
    levels = Levels(text, dense, harshest, [])
    for wanted in (0.1, 0.5, 0.9):
        assert levels.dropping(wanted).sparsity == pytest.approx(wanted, abs=NEAR)


def test_a_curves_nodes_are_begun_with() -> None:
    text = FakeText(lambda level: (1 - level) ** 0.5)
    nodes = [(level, (1 - level) ** 0.5) for level in (0.91, 0.8, 0.75, 0.74, 0.5)]
    levels = Levels(text, 1.0, 0.0, nodes)
    # Half is dropped at .75: on the line between the nodes beside it.
    assert levels.dropping(0.5).level == pytest.approx(0.75, abs=0.01)
    assert text.runs == 2


def test_own_zeros_are_never_undone() -> None:
    text = FakeText(lambda level: max(0.6, level))
    levels = Levels(text, 0.0, 1.0, [])
    assert levels.dropping(0.3) is levels.dense
    assert levels.dropping(0.8).sparsity == pytest.approx(0.8, abs=NEAR)
