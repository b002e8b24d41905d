"""The rows of a mixture's tensors by expert, read from the store without holding a whole layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparsity_atlas.activations.layout import group_name
from sparsity_atlas.activations.store import ActivationStore, Rows
from sparsity_atlas.terms import EXPERTS

# Of rows that are read to choose from, in float32, or one chunk of the store if that is more.
BLOCK_BYTES = 32 * 2**20
# Of chosen rows in memory at a time. Each time all of a layer's rows are read to choose from.
HELD_BYTES = 512 * 2**20


class Routed(NamedTuple):
    """Rows of a routed tensor.

    values: float32 [rows, width]; of `input` a token's vector once for each of its experts.
    experts: int32 [rows], the expert of each.
    """

    values: np.ndarray
    experts: np.ndarray


def routed_to(store: ActivationStore, layer: int, stop: int | None = None) -> np.ndarray:
    """The experts of the first `stop` tokens of a layer (None: of all): int32 [tokens, K]."""
    return store.read(group_name(EXPERTS, "index"), layer, 0, stop)


def loads(store: ActivationStore, layer: int, stop: int | None = None) -> list[int]:
    """How many of the first `stop` tokens went to each of a layer's experts."""
    experts = store.rows(group_name(EXPERTS, "index"), layer).experts
    index = routed_to(store, layer, stop).ravel()
    counts: list[int] = np.bincount(index, minlength=experts).tolist()
    return counts


def blocks(
    store: ActivationStore, tensor: str, layer: int, stop: int | None = None
) -> Iterator[Routed]:
    """All rows of the first `stop` tokens with their experts, in order, a block at a time."""
    rows = store.rows(group_name(EXPERTS, tensor), layer)
    index = routed_to(store, layer, stop)
    tokens, repeats = len(index), index.shape[1] // rows.each
    step = _tokens(rows)
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        values = rows[first * rows.each : last * rows.each]
        if repeats > 1:
            values = values.repeat(repeats, axis=0)
        yield Routed(values, index[first:last].reshape(-1))


def _tokens(rows: Rows) -> int:
    """Tokens of a block: whole chunks."""
    chunk = rows.chunk // rows.each
    return max(1, BLOCK_BYTES // (4 * rows.shape[1] * rows.chunk)) * chunk


def of_experts(
    store: ActivationStore,
    tensor: str,
    layer: int,
    experts: Sequence[int],
    stop: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of some experts, one after the other.

    Args:
        store: the store.
        tensor: of routed experts.
        layer: of the model.
        experts: which ones; as many of them are in memory at a time as take HELD_BYTES, at least one.
        stop: tokens that are looked at; None: all.

    Yields:
        An expert, and its rows, token behind token: float32 [rows, width].
    """
    width = store.shape(group_name(EXPERTS, tensor), layer)[1]
    load = loads(store, layer, stop)
    waiting = list(experts)
    while waiting:
        counts = {expert: load[expert] for expert in waiting}
        ends = np.cumsum([4 * width * count for count in counts.values()])
        held = waiting[: max(1, int((ends <= HELD_BYTES).sum()))]
        waiting = waiting[len(held) :]
        found = {expert: np.empty((counts[expert], width), np.float32) for expert in held}
        filled = dict.fromkeys(held, 0)
        for block in blocks(store, tensor, layer, stop):
            for expert in held:
                own = block.values[block.experts == expert]
                found[expert][filled[expert] : filled[expert] + len(own)] = own
                filled[expert] += len(own)
        for expert in held:
            yield expert, found.pop(expert)
