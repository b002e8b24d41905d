"""Text by filling masks in, block by block, the surest tokens first (arXiv 2502.09992)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sparsity_atlas.diffusion.denoise import Asked, Denoise, guided, padded
from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.sparsify.transfer import sent

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True)
class Schedule:
    """How many tokens each step fills in.

    Where everything divides these are LLaDA's numbers: `steps` / blocks for each block. Its sampler refuses
    anything else. Here what does not divide goes to what comes first: earlier blocks take the steps that are
    left over, and earlier steps of a block its tokens, as in LLaDA's, too (ML-GSAI/LLaDA, generate.py:
    `get_num_transfer_tokens`).

    Attributes:
        length: tokens to generate.
        steps: forward passes of a row.
        block_length: tokens of a block; a block is whole before the next one begins.
        blocks: first token of each block, the one after its last, and what each of its steps fills in.
    """

    length: int
    steps: int
    block_length: int
    blocks: tuple[tuple[int, int, tuple[int, ...]], ...] = field(init=False)

    def __post_init__(self) -> None:
        starts = range(0, self.length, self.block_length)
        if not len(starts) <= self.steps <= self.length:
            raise AtlasError(
                f"steps: {self.steps} found; {self.length} tokens in blocks of {self.block_length} take "
                f"{len(starts)} to {self.length}"
            )
        object.__setattr__(self, "blocks", tuple(self._blocks(starts)))

    def _blocks(self, starts: range) -> Iterable[tuple[int, int, tuple[int, ...]]]:
        # A step for each block, and the others by its length; what a block has fewer tokens for goes on.
        done, spent = 0, 0
        for number, start in enumerate(starts):
            end = min(start + self.block_length, self.length)
            later = len(starts) - number - 1
            fair = (self.steps * end + self.length - 1) // self.length - spent
            most = min(end - start, self.steps - spent - later)
            steps = max(1, min(fair, most), self.steps - spent - (self.length - end))
            tokens, more = divmod(end - start, steps)
            yield start, end, tuple(tokens + (step < more) for step in range(steps))
            spent += steps
            done = end
        assert (done, spent) == (self.length, self.steps)


def unmask(
    denoise: Denoise,
    prompts: Sequence[Sequence[int]],
    schedule: Schedule,
    *,
    mask_token: int,
    padding: int,
    device: torch.device,
    remasking: Remasking = "low_confidence",
    guidance: float = 0.0,
    seeds: Sequence[str] = (),
    finished: Callable[[int, list[int]], bool] = lambda row, tokens: False,
) -> list[list[int]]:
    """Generate after each prompt; a row does not depend on the others, but for rounding.

    Each step fills in the likeliest token at some of the block's masks, never the mask itself: where the
    model is surest, by the odds of that token against all others; of places that tie, the first.

    Args:
        denoise: the model.
        prompts: token ids.
        schedule: how many tokens, and how many a step.
        mask_token: id of the mask.
        padding: id that rows are filled up with.
        device: of the model.
        remasking: which masks are filled in: `low_confidence` leaves the least sure ones, `random` any.
        guidance: see `guided`.
        seeds: of each row, hexadecimal; for `random`.
        finished: asked after each block whether what a row has generated so far is all that is wanted of it.

    Returns:
        What each row generated: `schedule.length` tokens, or those up to the end of the block with which it
        was finished.

    Raises:
        NumericalFailure: NaN came up in the logits.
    """
    if remasking not in get_args(Remasking):
        known = ", ".join(get_args(Remasking))
        raise AtlasError(f"remasking: unknown '{remasking}'; known: {known}")
    drawn = remasking == "random"
    length = schedule.length
    rows = [[*prompt, *[mask_token] * length] for prompt in prompts]
    ids, valid = padded(rows, padding, device)
    begins = sent(np.array([len(prompt) for prompt in prompts]), device)[:, None]
    # Of each place its rank: the first is filled in first.
    ranks = sent(np.array([_ranks(seed, length) for seed in seeds]), device) if drawn else None
    running = list(range(len(rows)))
    done: list[list[int]] = [[] for _ in rows]
    step = 0
    for start, end, counts in schedule.blocks:
        # Nothing here waits for the device before the block is whole.
        left = torch.arange(start, end, device=device).expand(len(running), -1)
        offsets = torch.arange(len(running), device=device)[:, None] * ids.shape[1]
        whole = torch.ones((), dtype=torch.bool, device=device)
        for count in counts:
            asked = Asked(
                *(ids, valid, (offsets + begins + left).flatten()),
                torch.arange(ids.shape[1], device=device) < begins,
                step=step,
                rows=tuple(running),
            )
            step += 1
            pieces = guided(denoise, asked, guidance=guidance, mask_token=mask_token)
            tokens, odds = (one.view(left.shape) for one in _likeliest(pieces, mask_token))
            whole = whole & ~odds.isnan().any()
            sure = odds if ranks is None else -ranks.gather(1, left)
            order = sure.sort(dim=1, descending=True, stable=True).indices
            chosen, others = order[:, :count], order[:, count:].sort(dim=1).values
            ids = ids.scatter(1, begins + left.gather(1, chosen), tokens.gather(1, chosen))
            left = left.gather(1, others)
        written = ids.gather(1, begins + torch.arange(end, device=device)).tolist()
        if not whole:
            raise NumericalFailure("NaN or infinity in the logits")
        for row, found in zip(running, written, strict=True):
            done[row] = found
        kept = [n for n, row in enumerate(running) if not finished(row, done[row])]
        if not kept:
            break
        if len(kept) < len(running):
            running = [running[n] for n in kept]
            longest = max(len(rows[row]) for row in running)
            places = sent(np.array(kept), device)
            ids, valid = ids[places, :longest], valid[places, :longest]
            begins = begins[places]
            ranks = None if ranks is None else ranks[places]
    return done


def _ranks(seed: str, length: int) -> np.ndarray:
    """A random order of places: int64 [length], of each which in turn it is."""
    drawn = np.random.Generator(np.random.PCG64(int(seed, 16))).random(length)
    ranks: np.ndarray = np.argsort(np.argsort(-drawn, kind="stable"), kind="stable")
    return ranks


def _likeliest(pieces: Iterable[Tensor], mask_token: int) -> tuple[Tensor, Tensor]:
    """The likeliest token of each place but the mask, and the logarithm of its odds against all others.

    Odds order places as probabilities do, and still where these are rounded to 1.
    """
    tokens, odds = [], []
    for piece in pieces:
        logits = piece.float()
        logits[:, mask_token] = -torch.inf
        best, token = logits.max(dim=1, keepdim=True)
        others = logits.scatter_(1, token, -torch.inf).logsumexp(dim=1)
        tokens.append(token[:, 0])
        odds.append(best[:, 0] - others)
    return torch.cat(tokens), torch.cat(odds)
