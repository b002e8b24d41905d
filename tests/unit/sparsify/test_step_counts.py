"""Masks over denoising steps, against loops over rows, tokens and neurons."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtures import EACH, EXPERTS
from sparsity_atlas.sites.experts.grouping import group
from sparsity_atlas.sites.experts.mixture import RoutedVectors
from sparsity_atlas.sites.part import Routing, Vectors
from sparsity_atlas.sparsify import packed_bits, step_counts
from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.sparsify.packed_bits import ones, packed, words
from sparsity_atlas.sparsify.step import Step
from sparsity_atlas.sparsify.step_counts import ByStep, mask_bytes
from sparsity_atlas.sparsify.step_sums import BLOCK_SUMS, TOKEN_SUMS
from sparsity_atlas.terms import PlaceKey
from step_loops import Seen, by_loops, sets

WIDTH = 70
PROMPTS, ANSWER = (3, 0, 5, 1), 6
# Rows that run in each step, and how many of their tokens are filled in.
STEPS = [((0, 1, 2, 3), 0), ((0, 1, 2, 3), 2), ((0, 1, 3), 3), ((1, 3), 5), ((1,), 6)]


def steps() -> list[tuple[Step, Tensor]]:
    """Steps of four rows, of which one has no prompt, and the longest ends first; with what is valid."""
    found = []
    for number, (rows, filled) in enumerate(STEPS):
        lengths = [PROMPTS[row] for row in rows]
        place = torch.arange(max(lengths) + ANSWER)
        begin = torch.tensor(lengths)[:, None]
        valid = place < begin + ANSWER
        # From the end, and in the last row from the front.
        masked = valid & (place >= begin) & (place < begin + ANSWER - filled)
        masked[-1] = valid[-1] & (place >= lengths[-1] + filled)
        found.append((Step(number, rows, place < begin, masked), valid))
    return found


def dense_vectors(values: Tensor) -> Vectors:
    return Vectors(SimpleNamespace(layer=0, name="ffn"), "intermediate", values)  # type: ignore[arg-type]


@pytest.fixture(params=[False, True], ids=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(step_counts, "CHUNK", 2 * 11 * WIDTH)


@pytest.mark.usefixtures("pieces")
def test_sums_are_those_of_loops() -> None:
    slot = Slot(PlaceKey(0, "ffn", "intermediate"), WIDTH, 4)
    by_step = ByStep([slot])
    draw = torch.Generator().manual_seed(1)
    passes = []
    for step, valid in steps():
        kept = torch.rand(*valid.shape, WIDTH, generator=draw) < 0.3
        kept[:, :2] = step.number == 0  # masks that keep all, and none
        kept[..., 0] = True
        kept[0, 0] = False
        passes.append(Seen(step, valid, sets(kept)))
        by_step.announce(step, valid)
        by_step.add(dense_vectors(kept), kept)
        # Guidance's pass is not another step.
        by_step.announce(Step(step.number, step.rows, step.prompt, step.masked, guide=True), valid)
        by_step.add(dense_vectors(kept), ~kept)
    agree(by_step, by_loops(passes, WIDTH))


def test_experts_are_told_apart() -> None:
    """Two masks of a token have in common what the same expert keeps."""
    width = 8
    slot = Slot(
        PlaceKey(0, "experts", "up"),
        EACH * width,
        4,
        Routing(EXPERTS, EACH, width),
        of_experts=True,
    )
    by_step = ByStep([slot])
    draw = torch.Generator().manual_seed(2)
    passes = []
    for step, valid in steps():
        batch = tuple(valid.shape)
        index = torch.rand(valid.numel(), EXPERTS, generator=draw).argsort(1)[:, :EACH]
        grouping = group(index, EXPERTS)
        kept = torch.rand(index.numel(), width, generator=draw) < 0.5
        part: Any = SimpleNamespace(layer=0, name="experts", rows_are_tokens=lambda _: False)
        by_step.announce(step, valid)
        by_step.add(RoutedVectors(part, "up", kept, grouping, batch), kept)
        whole = torch.zeros(valid.numel(), EXPERTS, width, dtype=torch.bool)
        for row, (token, expert) in enumerate(
            zip(grouping.tokens.tolist(), grouping.experts.tolist(), strict=True)
        ):
            whole[token, expert] = kept[row]
        passes.append(Seen(step, valid, sets(whole.flatten(1).unflatten(0, batch))))
    agree(by_step, by_loops(passes, EXPERTS * width))


def agree(by_step: ByStep, wanted: tuple[list, list, list, list]) -> None:
    members, tokens, blocks, over = by_step.take()
    assert members.tolist() == wanted[0]
    for found, loops, names in ((tokens, wanted[1], TOKEN_SUMS), (blocks, wanted[2], BLOCK_SUMS)):
        for number, step in enumerate(found[:, 0].tolist()):
            for name, one, other in zip(names, step, loops[number], strict=True):
                assert one == other, (number, name)
    assert over[0].tolist() == wanted[3]
    assert by_step.take() == []


def test_what_is_no_step_is_not_counted() -> None:
    by_step = ByStep([Slot(PlaceKey(0, "ffn", "intermediate"), WIDTH, 4)])
    by_step.announce(None, torch.ones(1, 4, dtype=torch.bool))
    assert not by_step.counts
    assert by_step.take() == []


def test_a_batch_begins_with_step_zero() -> None:
    """Also after one whose sums nobody took, as of a task that failed."""
    slot = Slot(PlaceKey(0, "ffn", "intermediate"), WIDTH, 4)
    step, valid = steps()[0]
    kept = torch.ones(*valid.shape, WIDTH, dtype=torch.bool)
    found = []
    for times in (1, 2):
        by_step = ByStep([slot])
        for _ in range(times):
            by_step.announce(step, valid)
            by_step.add(dense_vectors(kept), kept)
        found.append(by_step.take())
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_bits(width: int) -> None:
    mask = torch.rand(3, 5, width, generator=torch.Generator().manual_seed(width)) < 0.5
    mask[0, 0], mask[0, 1] = True, False
    found = packed(mask)
    assert found.shape == (3, 5, words(width))
    assert ones(found).tolist() == mask.sum(-1).tolist()
    # As other devices do it.
    slow = packed_bits.packed_by_torch(mask)
    assert torch.equal(slow, found)
    assert packed_bits.ones_by_torch(slow).tolist() == mask.sum(-1).tolist()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept between two passes is no more than is said."""
    monkeypatch.setattr(step_counts, "CHUNK", 0)
    slot = Slot(PlaceKey(0, "ffn", "intermediate"), WIDTH, 4)
    by_step = ByStep([slot])
    for step, valid in steps()[:2]:
        by_step.announce(step, valid)
        kept = torch.ones(*valid.shape, WIDTH, dtype=torch.bool)
        by_step.add(dense_vectors(kept), kept)
    state = by_step._kept[0]
    assert state.before is not None
    assert state.first is not None
    held = [state.before.bits, state.before.count, state.first.bits, state.first.count]
    held += [one for one in (state.block_before, state.block_first, state.used) if one is not None]
    held += [one for sums in by_step._sums for pair in sums if pair is not None for one in pair]
    rows, tokens = valid.shape
    said = mask_bytes([slot], rows, tokens, 2) - 3 * rows * tokens * WIDTH
    assert sum(one.numel() * one.element_size() for one in held) == said
