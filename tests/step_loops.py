"""What masks over denoising steps come to, token by token and neuron by neuron."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from sparsity_atlas.sparsify.step import Step
from sparsity_atlas.sparsify.step_sums import (
    BINS,
    BLOCK_SUMS,
    BLOCKS,
    REGIONS,
    TOKEN_SUMS,
    UNIT,
)


@dataclass
class Seen:
    """A denoising pass: what it was announced as, and the neurons that each token keeps [row][token]."""

    step: Step
    valid: Tensor
    kept: list[list[set[int]]]


def sets(mask: Tensor) -> list[list[set[int]]]:
    """The neurons that each token keeps, of bool [rows, tokens, neurons]."""
    return [
        [{neuron for neuron, one in enumerate(token) if one} for token in row]
        for row in mask.tolist()
    ]


def by_loops(passes: list[Seen], neurons: int) -> tuple[list, list, list, list]:
    """What `ByStep.take` gives of one slot, from sets."""
    members, tokens, blocks = [], [], []
    was: dict[int, list[set[int]]] = {}
    first: dict[int, list[set[int]]] = {}
    masked_before: dict[int, list[bool]] = {}
    used_ever: dict[tuple[int, int], Counter[int]] = {}
    tokens_ever: Counter[tuple[int, int]] = Counter()
    for seen in passes:
        step = seen.step
        count: Counter[str] = Counter()
        sums: Counter[tuple[str, str]] = Counter()
        of_blocks: Counter[tuple[str, str]] = Counter()
        for place, row in enumerate(step.rows):
            of_block: dict[int, list[int]] = {0: [], 1: []}
            masked = (step.masked[place] & seen.valid[place]).tolist()
            for token in range(int(seen.valid[place].sum())):
                prompt = bool(step.prompt[place, token])
                of_block[int(not prompt)].append(token)
                region = "filled"
                if prompt:
                    region = "prompt"
                elif masked[token]:
                    region = "masked"
                elif row in masked_before and masked_before[row][token]:
                    region = "new"
                count[region] += 1
                own = seen.kept[place][token]
                sums["kept", region] += len(own)
                for name, other in (("previous", was), ("first", first)):
                    if row in other:
                        there = other[row][token]
                        either = len(own | there)
                        sums[f"{name}_kept", region] += len(there)
                        sums[f"{name}_both", region] += len(own & there)
                        index = len(own & there) * UNIT // either if either else UNIT
                        sums[f"{name}_jaccard", region] += index
            for block, some in of_block.items():
                name = BLOCKS[block]
                count[f"rows of {name}"] += bool(some)
                often = Counter(n for token in some for n in seen.kept[place][token])
                of_blocks["used", name] += len(often)
                for which, other in (("previous", was), ("first", first)):
                    if row in other:
                        there = {n for token in some for n in other[row][token]}
                        of_blocks[f"{which}_used", name] += len(there)
                        of_blocks[f"{which}_used_both", name] += len(there & set(often))
                used_ever.setdefault((row, block), Counter()).update(often)
                tokens_ever[row, block] += len(some)
                for neuron in range(neurons if some else 0):
                    of_blocks[f"frequency_{bin_of(often[neuron], len(some))}", name] += 1
            was[row] = seen.kept[place]
            first.setdefault(row, seen.kept[place])
            masked_before[row] = masked
        members.append([*(count[r] for r in REGIONS), *(count[f"rows of {b}"] for b in BLOCKS)])
        tokens.append([[sums[name, region] for region in REGIONS] for name in TOKEN_SUMS])
        blocks.append([[of_blocks[name, block] for block in BLOCKS] for name in BLOCK_SUMS])
    over = [[0] * len(BLOCKS) for _ in range(BINS)]
    for (row, block), often in used_ever.items():
        for neuron in range(neurons if tokens_ever[row, block] else 0):
            over[bin_of(often[neuron], tokens_ever[row, block])][block] += 1
    return members, tokens, blocks, over


def bin_of(count: int, tokens: int) -> int:
    """None of them, (0, 10 %], ..., (90 %, 100 %), all."""
    if count in (0, tokens):
        return 0 if count == 0 else BINS - 1
    return next(one for one in range(1, BINS - 1) if 10 * count <= one * tokens)
