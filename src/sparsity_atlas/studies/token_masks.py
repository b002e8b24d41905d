"""How the masks of a sequence's tokens go together: what several tokens leave unused, and what they share.

Everything is counted from masks alone, of whole sequences, a block at a time; an entry is kept where the
criterion keeps it and it is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("level", "part", "tensor")),
        ("layer", pa.int64()),
        ("quantity", pa.string()),
        ("at", pa.float64()),
        *((name, pa.float64()) for name in ("value", "independent", "by_frequency")),
    ]
)
UNUSED, REUSE, JACCARD, POSITION, FREQUENCY = (
    "unused",
    "reuse",
    "jaccard",
    "sparsity",
    "frequency",
)
QUANTITIES = (UNUSED, REUSE, JACCARD, POSITION, FREQUENCY)
# A neuron's frequency is the share of tokens that keep it; below 0.5 as many steps as above.
FREQUENCIES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
# The level of masks that no criterion made: what is not exactly zero.
EXACT = "exact"


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to a number."""
    return [1 << power for power in range(most.bit_length())]


class MaskSums:
    """Counts of one tensor's masks at one level.

    Windows of t tokens, t a power of two, stand one after the other from a sequence's beginning; a rest that
    fills none is left out. Distances are powers of two, too.
    """

    def __init__(self, length: int) -> None:
        """Begin.

        Args:
            length: tokens of a sequence.
        """
        self.length = length
        self.windows = powers_of_two(length)
        self.distances = powers_of_two(length - 1) if length > 1 else []
        self.sequences = 0
        self.width = 0
        # Tensors on the device of the masks, so that nothing waits for it.
        self._by_position: Tensor | None = None
        self._by_neuron: Tensor | None = None
        self._used: Tensor | None = None
        self._shared: Tensor | None = None

    def add(self, kept: Tensor) -> None:
        """Count some sequences.

        Args:
            kept: bool [sequences, length, width].
        """
        sequences, _, self.width = kept.shape
        self.sequences += sequences
        used, window = [], kept
        for size in self.windows:
            if size > 1:
                whole = window.shape[1] // 2 * 2
                window = window[:, 0:whole:2] | window[:, 1:whole:2]
            used.append(window.sum())
        count = kept.sum(-1)
        shared = [
            _overlap(kept[:, :-distance] & kept[:, distance:], count, distance)
            for distance in self.distances
        ]
        found = (
            *(count.sum(0), kept.sum((0, 1))),
            *(torch.stack(used), torch.stack(shared) if shared else None),
        )
        self._by_position = _plus(self._by_position, found[0])
        self._by_neuron = _plus(self._by_neuron, found[1])
        self._used = _plus(self._used, found[2])
        self._shared = _plus(self._shared, found[3])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of SCHEMA without what names them: quantity, at, value, and what it would be by chance.

        unused: share of neurons that none of `at` consecutive tokens keeps. reuse: of what a token keeps the
        share that the token `at` before it keeps, too, and jaccard: of what one of the two keeps the share
        that both do; means over the tokens that keep something. sparsity: of the tokens from position `at` on
        up to twice that. frequency: share of neurons that at most a share `at` of the tokens keep.

        independent: if each entry were kept by itself, with the layer's sparsity s: s^t, 1 - s and
        (1 - s) / (1 + s). by_frequency: if each neuron were kept by itself, as often as it is.
        """
        assert self._by_position is not None
        assert self._by_neuron is not None
        assert self._used is not None
        tokens = self.sequences * self.length
        frequency = self._by_neuron.double().cpu() / tokens
        density = float(frequency.mean())
        for size, used in zip(self.windows, self._used.tolist(), strict=True):
            windows = self.sequences * (self.length // size)
            yield {
                **{"quantity": UNUSED, "at": size, "value": 1 - used / (windows * self.width)},
                "independent": (1 - density) ** size,
                "by_frequency": float(((1 - frequency) ** size).mean()),
            }
        yield from self._overlaps(frequency, density)
        kept = self._by_position.tolist()
        for first in (0, *self.windows):
            own = kept[first : max(2 * first, 1)]
            if own:
                share = sum(own) / (len(own) * self.sequences * self.width)
                yield {"quantity": POSITION, "at": first, "value": 1 - share}
        for most in FREQUENCIES[:-1]:
            # As integers, or a share of exactly that many tokens might miss it.
            rare = (self._by_neuron.cpu() <= most * tokens).double().mean()
            yield {"quantity": FREQUENCY, "at": most, "value": float(rare)}
        always = float((self._by_neuron.cpu() == tokens).double().mean())
        yield {"quantity": "always", "at": 1.0, "value": always}

    def _overlaps(self, frequency: Tensor, density: float) -> Iterator[dict[str, Any]]:
        if self._shared is None:
            return
        both = float((frequency**2).sum())
        once = float(frequency.sum())
        for distance, sums in zip(self.distances, self._shared.tolist(), strict=True):
            reuse, jaccard, keeping, either = sums
            yield {
                **{"quantity": REUSE, "at": distance},
                "value": reuse / keeping if keeping else None,
                "independent": density,
                "by_frequency": both / once if once else None,
            }
            yield {
                **{"quantity": JACCARD, "at": distance},
                "value": jaccard / either if either else None,
                "independent": density / (2 - density),
                "by_frequency": both / (2 * once - both) if once else None,
            }


def _overlap(both: Tensor, count: Tensor, distance: int) -> Tensor:
    """Sums of reuse and of Jaccard indices, and of how many tokens: float64 [4].

    Args:
        both: bool [sequences, tokens, width], what a token and the one `distance` before it keep.
        count: of each token.
        distance: in tokens.
    """
    shared = both.sum(-1)
    own, before = count[:, distance:], count[:, :-distance]
    either = own + before - shared
    return torch.stack(
        [
            (shared.double() / own.clamp(min=1)).sum(),
            (shared.double() / either.clamp(min=1)).sum(),
            (own > 0).sum().double(),
            (either > 0).sum().double(),
        ]
    )


def _plus(before: Tensor | None, found: Tensor | None) -> Tensor | None:
    return found if before is None or found is None else before + found
