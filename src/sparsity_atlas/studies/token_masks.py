"""How the masks of a sequence's tokens go together: what several tokens leave unused, and what they share.

Everything is counted from masks alone, of whole sequences, a block at a time; an entry is kept where the
criterion keeps it and it is not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sparsity_atlas.sparsify.packed_bits import ones, packed
from sparsity_atlas.studies.coactivation import CoActivation
from sparsity_atlas.studies.mask_table import (
    ALWAYS,
    EXACT,
    FREQUENCY,
    JACCARD,
    POSITION,
    REUSE,
    SCHEMA,
    UNUSED,
)
from sparsity_atlas.terms import PlaceKey

# Shares of the tokens that keep a neuron.
FREQUENCIES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
# Share of exact zeros from which on they are counted by themselves.
EXACT_SHARE = 0.01


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
        bits = packed(kept)
        count = ones(bits)
        used, window = [], bits
        for size in self.windows:
            if size > 1:
                whole = window.shape[1] // 2 * 2
                window = window[:, 0:whole:2] | window[:, 1:whole:2]
            used.append(ones(window).sum())
        shared = [
            _overlap(ones(bits[:, :-distance] & bits[:, distance:]), count, distance)
            for distance in self.distances
        ]
        self._by_position = _plus(self._by_position, count.sum(0))
        self._by_neuron = _plus(self._by_neuron, by_neuron(kept))
        self._used = _plus(self._used, torch.stack(used))
        self._shared = _plus(self._shared, torch.stack(shared) if shared else None)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of SCHEMA without what names them: quantity, at, value, and what it would be by chance.

        unused: share of neurons that none of `at` consecutive tokens keeps. reuse: of what a token keeps the
        share that the token `at` before it keeps, too, and jaccard: of what one of the two keeps the share
        that both do; means over the tokens that keep something. sparsity: of the tokens from position `at` on
        up to twice that. frequency: share of neurons that at most a share `at` of the tokens keep, and
        always: that all of them keep.

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
        for most in FREQUENCIES:
            rare = (self._by_neuron.cpu() <= most * tokens).double().mean()
            yield {"quantity": FREQUENCY, "at": most, "value": float(rare)}
        always = float((self._by_neuron.cpu() == tokens).double().mean())
        yield {"quantity": ALWAYS, "at": 1, "value": always}

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


def by_neuron(kept: Tensor) -> Tensor:
    """How many tokens keep each neuron: int64 [width] of bool [sequences, tokens, width]."""
    rows = kept.flatten(0, 1).view(torch.uint8)
    if rows.device.type != "cpu":
        return rows.sum(0, dtype=torch.int64)
    # Ten times as fast as torch's own sum over rows.
    return torch.from_numpy(rows.numpy().sum(0, dtype=np.int32).astype(np.int64))


def _overlap(shared: Tensor, count: Tensor, distance: int) -> Tensor:
    """Sums of reuse and of Jaccard indices, and of how many tokens: float64 [4].

    Args:
        shared: [sequences, tokens], entries that a token and the one `distance` before it keep.
        count: entries that each token keeps.
        distance: in tokens.
    """
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


class MaskTables:
    """What is counted of a site's masks: of every level, layer, part and tensor.

    Of routed experts nothing is: a token's rows are of the experts that it meets, so that neighbours have no
    neurons in common unless they meet the same ones.
    """

    def __init__(self, length: int, neurons: int = 0) -> None:
        """Begin.

        Args:
            length: tokens of a sequence.
            neurons: of each layer whose pairs are counted; 0: none.
        """
        self._length = length
        self._neurons = neurons
        self._sums: dict[tuple[str, PlaceKey], list[MaskSums | CoActivation]] = {}
        self._others: list[dict[str, Any]] = []

    def add(self, level: str, place: PlaceKey, kept: Tensor) -> None:
        """Count the masks of some sequences, bool [sequences, length, width]."""
        if (level, place) not in self._sums:
            pairs = [CoActivation(self._neurons)] if self._neurons else []
            self._sums[level, place] = [MaskSums(self._length), *pairs]
        for one in self._sums[level, place]:
            one.add(kept)

    def extend(self, place: PlaceKey, rows: Iterable[dict[str, Any]]) -> None:
        """Take in what others counted of a place: rows of SCHEMA without what names it."""
        self._others += [{**place._asdict(), **row} for row in rows]

    def add_exact(self, place: PlaceKey, values: Tensor) -> None:
        """Count what is not exactly zero, where the first sequences that are seen have zeros.

        Args:
            place: where.
            values: [sequences, length, width], untouched.
        """
        kept = values != 0
        if (EXACT, place) in self._sums or 1 - float(kept.double().mean()) >= EXACT_SHARE:
            self.add(EXACT, place, kept)

    def table(self) -> pa.Table:
        """Rows of SCHEMA."""
        rows = [
            {"level": level, **place._asdict(), **row}
            for (level, place), counts in self._sums.items()
            for sums in counts
            for row in sums.rows()
        ]
        return pa.Table.from_pylist(rows + self._others, SCHEMA)
