"""Which neurons are on together: counts of pairs among some of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity_atlas.studies.mask_table import BEST_PARTNER, COACTIVATION


class CoActivation:
    """Counts of tokens that keep a neuron, and two of them; 8 · neurons² bytes."""

    def __init__(self, neurons: int) -> None:
        """Begin.

        Args:
            neurons: of a layer that are looked at, drawn once for each width; all, where it has fewer.
        """
        self._neurons = neurons
        self._index: Tensor | None = None
        self._together: Tensor | None = None
        self._tokens = 0

    def add(self, kept: Tensor) -> None:
        """Count some sequences, bool [sequences, length, width]."""
        if self._index is None:
            drawn = np.random.default_rng(0).permutation(kept.shape[-1])[: self._neurons]
            self._index = torch.from_numpy(np.sort(drawn)).to(kept.device)
        # Exact: no block has 2^24 tokens.
        rows = kept.flatten(0, 1)[:, self._index].float()
        found = (rows.T @ rows).double()
        self._together = found if self._together is None else self._together + found
        self._tokens += len(rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of `mask_table.SCHEMA`, at the number of neurons; nothing where fewer than two are ever on.

        coactivation: of the tokens that keep one of two neurons the share that keep both, mean over pairs of
        neurons that are on at some time. best_partner: of the tokens that keep a neuron the share that keep
        the other one that goes with it most often, mean over neurons. by_frequency: if each neuron were kept
        by itself, as often as it is.
        """
        assert self._together is not None
        together = self._together.cpu().numpy()
        often = np.diag(together)
        on = often > 0
        together, often = together[np.ix_(on, on)], often[on]
        if len(often) < 2:
            return
        share = often / self._tokens
        chance = share[:, None] * share
        pairs = np.triu_indices(len(often), 1)
        either = often[:, None] + often - together
        chance_either = share[:, None] + share - chance
        density = float(share.mean())
        yield {
            **{"quantity": COACTIVATION, "at": len(often)},
            "value": float((together / either)[pairs].mean()),
            "independent": density / (2 - density),
            "by_frequency": float((chance / chance_either)[pairs].mean()),
        }
        apart = together.copy()
        np.fill_diagonal(apart, 0)
        other = np.where(share == share.max(), np.partition(share, -2)[-2], share.max())
        yield {
            **{"quantity": BEST_PARTNER, "at": len(often)},
            "value": float((apart.max(1) / often).mean()),
            "independent": density,
            "by_frequency": float(other.mean()),
        }
