"""What an allocation takes: tokens that it runs through the model, and what that follows from.

Light enough for Snakemake's own process, which asks: no library is imported.
"""

from __future__ import annotations

import json

# Tokens that errors and divergences are measured on.
ERROR_TOKENS = 1024
# Sparsities at which a tensor is tried alone: by an output's error, and by the loss where they are not 0.
ERRORS, LOSSES = 21, 6
# Outputs of a block that greedy steps try, by the square of its tensors: so many as a Llama's widths need.
GREEDY = 30
# Of an evolution: targets that are searched for, candidates that come new in each generation, and generations
# for each block: the more there are, the more exchanges it takes.
TARGETS = 9
OFFSPRING, GENERATIONS = 6, 4


def candidates(blocks: int) -> int:
    """Candidates of one target at most: even ones, the last target's best, and children."""
    return 3 + OFFSPRING * GENERATIONS * blocks


def allocation(criterion: str) -> str:
    """How a criterion's level is spread over layers, of its JSON."""
    return str(json.loads(criterion).get("allocation", "uniform"))


def tokens_run(allocation: str, layers: int, tensors: int, calibration: int) -> int:
    """Tokens that pass the whole model, as an upper bound where blocks or FFNs are run alone.

    Args:
        allocation: one of `terms.ALLOCATIONS`.
        layers: of the model.
        tensors: of the site in each of them.
        calibration: tokens of the calibration.
    """
    errors = ERROR_TOKENS * ERRORS * tensors
    steps = ERROR_TOKENS * GREEDY * tensors**2 if tensors > 1 else 0
    searched = TARGETS * candidates(layers)
    return {
        "uniform": 0,
        "equal_cett": errors,
        "sensitivity": calibration * (1 + LOSSES * layers * tensors),
        "greedy": errors + steps,
        "evolutionary": errors + steps + ERROR_TOKENS * (1 + searched),
    }[allocation]
