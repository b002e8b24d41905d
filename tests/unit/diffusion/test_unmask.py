"""Generation by unmasking, against a loop over one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from masked_diffusion import MASK, VOCABULARY, logits_by_hand, save_diffusion
from sparsity_atlas.diffusion.denoise import Asked, denoiser
from sparsity_atlas.diffusion.unmask import Schedule, unmask
from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.files.whole import digest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load

GIVEN: dict[str, Any] = {"mask_token": MASK, "padding": 0, "device": torch.device("cpu")}
PROMPTS = [[5, 9, 33, 70, 12], [5, 9], [200, 31, 44, 44, 8, 9, 120, 3], [77]]
SEEDS = [digest(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion") / "m")


def slowly(
    folder: Path,
    prompt: list[int],
    length: int,
    per_step: list[list[int]],
    block: int,
    *,
    shifted: bool = False,
    guidance: float = 0.0,
    order: np.ndarray | None = None,
) -> list[int]:
    """Fill one row in, with all logits anew each step and nothing but its definition."""
    tokens = [*prompt, *[MASK] * length]

    def probabilities(given: list[int]) -> Tensor:
        logits = logits_by_hand(folder, torch.tensor([given]))[0].double()
        if guidance:
            bare = [MASK] * len(prompt) + given[len(prompt) :]
            without = logits_by_hand(folder, torch.tensor([bare]))[0].double()
            logits = without + (guidance + 1) * (logits - without)
        if shifted:
            logits = torch.cat([logits[:1], logits[:-1]])
        logits[:, MASK] = -torch.inf
        return logits.softmax(-1)

    for number, counts in enumerate(per_step):
        inside = range(
            len(prompt) + number * block, len(prompt) + min((number + 1) * block, length)
        )
        for count in counts:
            likely, token = probabilities(tokens).max(-1)
            masked = [place for place in inside if tokens[place] == MASK]
            sure = {
                p: likely[p].item() if order is None else order[p - len(prompt)] for p in masked
            }
            for place in sorted(masked, key=lambda p: (-sure[p], p))[:count]:
                tokens[place] = int(token[place])
    return tokens[len(prompt) :]


PLANS = [
    (8, 8, 8, [[1] * 8]),
    (8, 4, 4, [[2, 2], [2, 2]]),
    (7, 3, 7, [[3, 2, 2]]),
    (10, 5, 4, [[2, 2], [2, 2], [2]]),
    (6, 2, 3, [[3], [3]]),
]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("length", "steps", "block", "per_step"), PLANS)
def test_as_a_loop_over_one_row(
    folder: Path, length: int, steps: int, block: int, per_step: list[list[int]], shifted: bool
) -> None:
    schedule = Schedule(length, steps, block)
    assert [list(counts) for _, _, counts in schedule.blocks] == per_step
    denoise = denoiser(load(Checkpoint(folder), device="cpu"), shifted=shifted)
    wanted = [slowly(folder, one, length, per_step, block, shifted=shifted) for one in PROMPTS]
    assert unmask(denoise, PROMPTS, schedule, **GIVEN) == wanted
    # Any batch, in any order.
    assert [unmask(denoise, [one], schedule, **GIVEN)[0] for one in PROMPTS] == wanted
    assert unmask(denoise, PROMPTS[::-1], schedule, **GIVEN)[::-1] == wanted
    assert MASK not in {token for row in wanted for token in row}


def test_guidance_and_random_order(folder: Path) -> None:
    denoise = denoiser(load(Checkpoint(folder), device="cpu"), shifted=False)
    schedule, per_step = Schedule(8, 4, 4), [[2, 2], [2, 2]]
    wanted = [slowly(folder, one, 8, per_step, 4, guidance=1.5) for one in PROMPTS]
    assert unmask(denoise, PROMPTS, schedule, guidance=1.5, **GIVEN) == wanted
    orders = [np.random.Generator(np.random.PCG64(int(one, 16))).random(8) for one in SEEDS]
    wanted = [
        slowly(folder, one, 8, per_step, 4, order=order)
        for one, order in zip(PROMPTS, orders, strict=True)
    ]
    random = {"remasking": "random", **GIVEN}
    assert unmask(denoise, PROMPTS, schedule, seeds=SEEDS, **random) == wanted
    alone = [
        unmask(denoise, [one], schedule, seeds=[own], **random)[0]
        for one, own in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert alone == wanted


def test_what_is_finished_is_run_no_further(folder: Path) -> None:
    inner = denoiser(load(Checkpoint(folder), device="cpu"), shifted=False)
    rows: list[tuple[int, tuple[int, ...]]] = []

    def denoise(asked: Asked) -> Any:
        assert len(asked.ids) == len(asked.rows)
        rows.append((asked.step, tuple(asked.rows)))
        return inner(asked)

    schedule = Schedule(8, 4, 2)
    whole = unmask(inner, PROMPTS, schedule, **GIVEN)
    found = unmask(
        denoise,
        PROMPTS,
        schedule,
        finished=lambda row, tokens: len(tokens) >= 2 * (row + 1),
        **GIVEN,
    )
    assert rows == [(0, (0, 1, 2, 3)), (1, (1, 2, 3)), (2, (2, 3)), (3, (3,))]
    assert found == [row[: 2 * (number + 1)] for number, row in enumerate(whole)]


def made_up(logits: Tensor) -> Any:
    """A model that says the same of a place whatever the tokens are: logits [tokens, vocabulary]."""

    def denoise(asked: Asked) -> Iterator[Tensor]:
        # In two pieces, as those of a large vocabulary are.
        for some in asked.where.tensor_split(2):
            yield logits[some % asked.ids.shape[1]].clone()

    return denoise


def test_ties_go_to_the_first_place_and_to_the_first_token() -> None:
    logits = torch.zeros(7, VOCABULARY)
    logits[:, [50, 60]] = 3.0
    seen = []

    def denoise(asked: Asked) -> Iterator[Tensor]:
        seen.append((asked.ids[0] != MASK).sum().item())
        yield from made_up(logits)(asked)

    found = unmask(denoise, [[9]], Schedule(6, 3, 6), **GIVEN)
    assert found == [[50] * 6]
    assert seen == [1, 3, 5]


def test_the_surest_first_also_where_probabilities_round_to_one() -> None:
    """exp(-30) is less than half of float32's step below 1."""
    logits = torch.full((4, VOCABULARY), -40.0)
    logits[1, 50], logits[2, 60], logits[3, 70] = 0.0, 10.0, 5.0
    order = []

    def denoise(asked: Asked) -> Iterator[Tensor]:
        order.append(asked.ids[0].tolist())
        yield from made_up(logits)(asked)

    assert unmask(denoise, [[9]], Schedule(3, 3, 3), **GIVEN) == [[50, 60, 70]]
    assert order == [[9, MASK, MASK, MASK], [9, MASK, 60, MASK], [9, MASK, 60, 70]]


def test_the_mask_is_no_answer() -> None:
    logits = torch.zeros(4, VOCABULARY)
    logits[:, MASK] = 100.0
    logits[:, 50] = 1.0
    assert unmask(made_up(logits), [[9]], Schedule(3, 2, 3), **GIVEN) == [[50, 50, 50]]


@pytest.mark.parametrize("length", range(1, 11))
def test_every_schedule_fills_in_all(length: int) -> None:
    for block in range(1, length + 2):
        least = -(-length // block)
        for steps in range(least, length + 1):
            blocks = Schedule(length, steps, block).blocks
            assert [start for start, _, _ in blocks] == list(range(0, length, block))
            assert sum(len(counts) for _, _, counts in blocks) == steps
            for start, end, counts in blocks:
                assert sum(counts) == end - start
                assert max(counts) - min(counts) <= 1
                assert min(counts) >= 1
        for steps in (least - 1, length + 1):
            with pytest.raises(AtlasError, match=rf"steps: {steps} found; .* take {least} to "):
                Schedule(length, steps, block)


def test_as_many_steps_for_each_block_as_published() -> None:
    for length, steps, block in ((256, 128, 32), (1024, 1024, 1024), (64, 16, 16)):
        blocks = Schedule(length, steps, block).blocks
        assert {len(counts) for _, _, counts in blocks} == {steps * block // length}


def test_what_is_refused() -> None:
    with pytest.raises(
        AtlasError, match="remasking: unknown 'topk'; known: low_confidence, random"
    ):
        unmask(
            made_up(torch.zeros(3, VOCABULARY)), [[1]], Schedule(2, 2, 2), remasking="topk", **GIVEN
        )
    with pytest.raises(NumericalFailure, match="NaN or infinity in the logits"):
        unmask(made_up(torch.full((3, VOCABULARY), torch.nan)), [[1]], Schedule(2, 2, 2), **GIVEN)
