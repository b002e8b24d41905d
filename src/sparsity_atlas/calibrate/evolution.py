"""A sparsity for each block by evolution: what one block gives up another takes on, and the fittest stay.

The coarse half of WiSparse (arXiv 2602.14452, without public code): a budget is spread over the blocks by an
evolutionary search, and within a block as the output's error says. Candidates change as in EvoPress (arXiv
2410.14649), and are judged as there, by the divergence from the dense model: blocks exchange steps, few of
them at a time, so that every candidate keeps the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_atlas import cli
from sparsity_atlas.calibrate.allocation_cost import GENERATIONS, OFFSPRING, TARGETS

# Targets that are searched for, the mildest first; between two of them sparsities are interpolated.
LEVELS = np.linspace(0, 1, TARGETS + 2)[1:-1]
# A step: of the smallest block this much of its sparsity, of the others as many parameters.
STEP = 0.05
# Candidates that stay from one generation to the next.
SURVIVORS = 2
# Steps that a child exchanges at most; the fewer the likelier.
EXCHANGES = 3
# Where children are drawn no more: so many in a row that were seen before.
TRIES = 64


@dataclass(frozen=True)
class Candidate:
    """An allocation over blocks.

    Attributes:
        steps: of each block, above or below the target; their sum is 0.
        refined: of each block, whether its tensors have sparsities of their own, else all have the block's.
    """

    steps: tuple[int, ...]
    refined: tuple[bool, ...]


@dataclass(frozen=True)
class Blocks:
    """The blocks that a target is spread over.

    Attributes:
        weights: float64 [blocks], of the mean: the entries or parameters of each.
        refinable: whether the tensors of a block may have sparsities of their own.
    """

    weights: np.ndarray
    refinable: bool

    def sparsities(self, candidate: Candidate, target: float) -> np.ndarray:
        """Of each block [blocks]; their weighted mean is the target."""
        moved: np.ndarray = np.array(candidate.steps) * (STEP * self.weights.min() / self.weights)
        return moved + target

    def fits(self, candidate: Candidate, target: float) -> bool:
        """Whether all sparsities lie between 0 and 1, but for rounding."""
        found = self.sparsities(candidate, target)
        return bool((found > -1e-9).all() and (found < 1 + 1e-9).all())

    def even(self) -> Iterator[Candidate]:
        """The same sparsity for all blocks: for all tensors as well, and divided within each block."""
        count = len(self.weights)
        yield Candidate((0,) * count, (False,) * count)
        if self.refinable:
            yield Candidate((0,) * count, (True,) * count)

    def drawn_in(self, candidate: Candidate, target: float) -> Candidate:
        """A candidate of another target, with steps given back until it fits this one."""
        steps = np.array(candidate.steps)
        made = candidate
        while steps.any() and not self.fits(made, target):
            steps[steps.argmax()] -= 1
            steps[steps.argmin()] += 1
            made = Candidate(tuple(steps.tolist()), candidate.refined)
        return made

    def child(self, parent: Candidate, target: float, draw: np.random.Generator) -> Candidate:
        """A candidate that differs in a few steps, or in how one block divides what it has."""
        steps, refined = list(parent.steps), list(parent.refined)
        if self.refinable and draw.random() < 0.25:
            chosen = int(draw.integers(len(refined)))
            refined[chosen] = not refined[chosen]
        if len(steps) > 1:
            for _ in range(int(draw.integers(1, EXCHANGES + 1, 2).min())):
                taker, giver = draw.choice(len(steps), 2, replace=False).tolist()
                steps[taker] += 1
                steps[giver] -= 1
        made = Candidate(tuple(steps), tuple(refined))
        return made if self.fits(made, target) else parent


def evolve(
    cost: Callable[[Candidate], float],
    blocks: Blocks,
    target: float,
    seed: int,
    known: Sequence[Candidate] = (),
) -> dict[Candidate, float]:
    """Search for the allocation of a target that costs least.

    Args:
        cost: of a candidate; asked once for each.
        blocks: that the target is spread over.
        target: mean sparsity.
        seed: of everything drawn at random.
        known: further candidates of the first population; those that do not fit are left out.

    Returns:
        The cost of every candidate that was tried, the even ones first.
    """
    draw = np.random.default_rng(seed)
    first = [*blocks.even(), *(one for one in known if blocks.fits(one, target))]
    found = {one: cost(one) for one in dict.fromkeys(first)}
    for _ in range(GENERATIONS * len(blocks.weights)):
        # Sorting is stable: of equals the one that was found first.
        parents = sorted(found, key=found.__getitem__)[:SURVIVORS]
        children: dict[Candidate, None] = {}
        tries = 0
        while len(children) < OFFSPRING and tries < TRIES:
            made = blocks.child(parents[int(draw.integers(len(parents)))], target, draw)
            new = made not in found and made not in children
            tries = 0 if new else tries + 1
            if new:
                children[made] = None
        found |= {one: cost(one) for one in children}
    return found


def over_blocks(
    cost: Callable[[np.ndarray], float],
    fine: Sequence[np.ndarray],
    weights: np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:
    """Sparsities of all tensors of all blocks at each target: [tensors, targets].

    Args:
        cost: of the whole model, by the sparsity of each of these tensors [tensors].
        fine: of each block, how a sparsity of it is divided among its tensors: [own tensors, targets].
        weights: float64 [blocks], of the mean.
        targets: mean sparsities, ascending from 0 to 1.
    """
    blocks = Blocks(weights, any(len(own) > 1 for own in fine))

    def divided(sparsities: np.ndarray, refined: np.ndarray) -> np.ndarray:
        """Tensors' sparsities; `refined` [blocks] is 0, 1 or, between two levels, a share."""
        return np.concatenate(
            [
                [share * np.interp(of_block, targets, row) + (1 - share) * of_block for row in own]
                for of_block, share, own in zip(sparsities, refined, fine, strict=True)
            ]
        )

    ends = np.zeros(len(weights)), np.ones(len(weights))
    best = next(blocks.even())
    chosen = []
    for number, level in enumerate(LEVELS.tolist()):

        def of(candidate: Candidate, level: float = level) -> float:
            found = np.clip(blocks.sparsities(candidate, level), 0, 1)
            return cost(divided(found, np.array(candidate.refined, dtype=float)))

        tried = evolve(of, blocks, level, number, [blocks.drawn_in(best, level)])
        best = min(tried, key=tried.__getitem__)
        even = ", ".join(f"{tried[one]:.4g}" for one in blocks.even())
        cli.logger.info(
            "allocation at %g: %.4g nats from the dense model, with all blocks alike %s; of %d tried",
            *(level, tried[best], even, len(tried)),
        )
        chosen.append((blocks.sparsities(best, level), np.array(best.refined, dtype=float)))
    # At both ends there is nothing to divide.
    sparsities = np.array([ends[0], *(one for one, _ in chosen), ends[1]]).clip(0, 1)
    refined = np.array([chosen[0][1], *(one for _, one in chosen), chosen[-1][1]])
    at = np.array([0, *LEVELS, 1])
    between = [
        np.array([np.interp(targets, at, column) for column in table.T])
        for table in (sparsities, refined)
    ]
    return np.stack(
        [divided(*column) for column in zip(*(one.T for one in between), strict=True)], 1
    )
