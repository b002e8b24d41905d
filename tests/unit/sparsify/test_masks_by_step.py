"""Masks over the steps of a masked-diffusion model's generation: any site, rule and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from masked_diffusion import MASK, VOCABULARY
from mixtures import tiny_mixture
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.diffusion.denoise import Asked, denoiser
from sparsity_atlas.diffusion.unmask import Schedule, unmask
from sparsity_atlas.models.logits import head
from sparsity_atlas.sites.find import SITES, TENSORS, Part, Vectors, find_parts, intercept
from sparsity_atlas.sparsify.attach import Counter, counted, sparsified
from sparsity_atlas.sparsify.counted_vectors import slots_of
from sparsity_atlas.sparsify.step import Step
from sparsity_atlas.terms import PlaceKey
from step_loops import Seen, by_loops, sets
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN: dict[str, Any] = {"mask_token": MASK, "padding": 0, "device": torch.device("cpu")}
PROMPTS = [[5, 9, 33, 70, 12], [5, 9], [200, 31, 44, 8], [77]]
SCHEDULE = Schedule(6, 4, 3)
Announce = Callable[[Tensor, Step], None]


class Replaced(Criterion):
    """Puts something in the place of what it drops, and by a mask."""

    dense_level = 1.0
    coarse_levels: ClassVar[tuple[str, ...]] = ("0.5",)

    def mask(self, values: Tensor, level: float) -> Tensor:
        return values.abs() >= values.abs().median(-1, keepdim=True).values

    def replace(self, values: Tensor, onto: Tensor, mask: Tensor, level: float) -> Tensor:
        return torch.where(mask, onto, 0.01)


def found_parts(model: Any) -> list[Part]:
    head.able(model)  # which it is not seen any more when something is attached
    return find_parts(model)


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    # With ReLU there are exact zeros, in u ⊙ g too.
    own = {"is_causal": False, "vocab_size": VOCABULARY, "initializer_range": 0.3}
    return found_parts(tiny_model("llama", hidden_act="relu", **own))


def generate(
    parts: list[Part], prompts: list[list[int]], announce: Announce, guidance: float = 0.0
) -> None:
    """Fill in answers, of which each row's ends a block earlier than the next one's."""
    inner = denoiser(parts[0].model, shifted=False)  # type: ignore[arg-type]

    def denoise(asked: Asked) -> Iterable[Tensor]:
        masked = (asked.ids == MASK) & ~asked.prompt
        announce(asked.valid, Step(asked.step, asked.rows, asked.prompt, masked, asked.guide))
        return list(inner(asked))

    def finished(row: int, tokens: list[int]) -> bool:
        return prompts[row] != PROMPTS[2]

    unmask(denoise, prompts, SCHEDULE, guidance=guidance, finished=finished, **GIVEN)


def counts(
    parts: list[Part],
    attached: AbstractContextManager[Counter],
    prompts: list[list[int]] = PROMPTS,
    guidance: float = 0.0,
) -> list[Tensor]:
    """What is counted by step."""
    with torch.no_grad(), attached as counter:
        generate(
            parts,
            prompts,
            lambda valid, step: counter.expect(valid, "denoising", step=step),
            guidance,
        )
        return counter.by_step.take()


def by_definition(
    parts: list[Part], site: str, rule: Criterion, level: float, neurons: dict[PlaceKey, int]
) -> list[tuple[list, list, list, list]]:
    """The same, of each place, by masks that are kept whole."""
    passes: dict[PlaceKey, list[Seen]] = {}
    now: list[tuple[Tensor, Step]] = []

    def rewrite(vectors: Vectors, onto: Tensor) -> Tensor:
        valid, step = now[-1]
        rows = vectors.values.flatten(0, -2)
        mask = rule.mask(rows, level)
        left = (mask & (rows != 0)).view(vectors.values.shape)
        if vectors.spread is not None:
            left = whole(vectors, left, neurons[vectors.key])
        passes.setdefault(vectors.key, []).append(Seen(step, valid, sets(left)))
        written = onto.reshape(rows.shape)
        made = rule.replace(rows, written, mask, level)
        return (torch.where(mask, written, 0) if made is None else made).view(onto.shape)

    with torch.no_grad(), intercept(parts, site, rewrite):
        generate(parts, PROMPTS, lambda valid, step: now.append((valid, step)))
    return [by_loops(seen, neurons[key]) for key, seen in passes.items()]


def whole(vectors: Any, left: Tensor, neurons: int) -> Tensor:
    """Masks of a token over the neurons of all experts."""
    grouping = vectors.grouping
    width = left.shape[-1]
    found = torch.zeros(len(grouping.index), neurons // width, width, dtype=torch.bool)
    found[grouping.tokens, grouping.experts] = left
    return found.flatten(1).unflatten(0, vectors.batch)


def agree(found: list[Tensor], wanted: list[tuple[list, list, list, list]]) -> None:
    members, tokens, blocks, over = found
    for place, of_slot in enumerate(wanted):
        assert members.tolist() == of_slot[0]
        assert tokens[:, place].tolist() == of_slot[1]
        assert blocks[:, place].tolist() == of_slot[2]
        assert over[place].tolist() == of_slot[3]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rule", [create({"rule": "topk"}), Replaced()], ids=["topk", "replaced"])
def test_all_sites(parts: list[Part], site: str, rule: Criterion) -> None:
    found = counts(parts, sparsified(parts[0].model, parts, site, rule, 0.4))
    slots = slots_of(parts, site)
    assert {slot.key.tensor for slot in slots} == set(TENSORS[site])
    neurons = {slot.key: slot.width for slot in slots}
    agree(found, by_definition(parts, site, rule, 0.4, neurons))


@pytest.mark.parametrize("site", ["input", "up", "intermediate"])
def test_experts(site: str) -> None:
    model = tiny_mixture("olmoe", is_causal=False, vocab_size=VOCABULARY)
    parts = found_parts(model)
    rule = create({"rule": "topk"})
    found = counts(parts, sparsified(model, parts, site, rule, 0.4))
    neurons = {}
    for slot in slots_of(parts, site):
        assert slot.routing is not None
        by_expert = site != "input"
        neurons[slot.key] = slot.routing.width * (slot.routing.experts if by_expert else 1)
    agree(found, by_definition(parts, site, rule, 0.4, neurons))


def test_batches_add_up(parts: list[Part]) -> None:
    """Rows one by one come to the same numbers as all together."""
    rule = create({"rule": "topk"})
    each = [
        counts(parts, sparsified(parts[0].model, parts, "all_inputs", rule, 0.4), [prompt])
        for prompt in PROMPTS
    ]
    together = counts(parts, sparsified(parts[0].model, parts, "all_inputs", rule, 0.4))
    for place, wanted in enumerate(together):
        total = torch.zeros_like(wanted)
        for one in each:
            total[: len(one[place])] += one[place]
        assert torch.equal(total, wanted)


def test_the_pass_that_guides_is_no_step(parts: list[Part]) -> None:
    rule = create({"rule": "topk"})
    attached = sparsified(parts[0].model, parts, "input", rule, 0.4)
    members = counts(parts, attached, guidance=0.5)[0]
    assert len(members) == SCHEDULE.steps


def test_the_untouched_model_has_no_masks(parts: list[Part]) -> None:
    assert counts(parts, counted(parts[0].model, parts)) == []
