"""Random numbers where lm-eval draws them: it seeds once, loads the tasks, and builds their requests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED


def seed_as_lm_eval(seed: int) -> None:
    """Seed Python, NumPy and torch as `lm_eval.simple_evaluate` does before it loads tasks.

    lm-eval's own seeds are 1234, but 0 for Python; another `seed` is that of all, as after `--seed`.
    """
    random.seed(DEFAULT_RANDOM_SEED if seed == DEFAULT_OTHER_SEED else seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class RandomState:
    """Where the three generators are."""

    python: Any
    numpy: Any
    torch: Any

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    def restore(self) -> None:
        """Go on from there."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
