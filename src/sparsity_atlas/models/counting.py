"""Count what a model's passes hold at once: bytes of the storages that are alive, operation by operation.

A few passes over one row of some lengths tell what a token, a pair of tokens and a row cost; see `Counted`.
The count is of tensors, not of what an allocator makes of them, so that it is the same at each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsity_atlas.models.counted import Counted
from sparsity_atlas.models.logits.head import REFUSALS, without_cache
from sparsity_atlas.models.positions import positions
from sparsity_atlas.sites.find import random_ids
from sparsity_atlas.sites.offloading import offloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a row: few, which show whether rows are filled (scans work on chunks of up to 256), and what a
# cache keeps of a token and of a row; and two lengths from which tokens and pairs of them are told apart.
FEW, LENGTHS = (16, 64), (256, 512)
# Rows and tokens of a pass whose tensors of pairs are told from others by size: those of tokens and tokens,
# or of one more where each row has a sink. No other is likely to be a multiple, as 131 and 263 are primes.
# Scores that are less than a layer's FFN here are more in long rows.
PAIRED = (2, 262)
# How deep tensors lie in what keeps keys and values.
DEPTH = 5


def count(model: PreTrainedModel) -> dict[str, Any] | None:
    """What a manifest says under `counted`; None for a model without a head."""
    if model.get_output_embeddings() is None:
        return None
    share = min((positions(model) or LENGTHS[1]) / LENGTHS[1], 1.0)
    while share * FEW[0] >= 1:
        try:
            return _counted(model, share)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:  # it may end behind a length of which there is no table
            share /= 2
    return None


def _counted(model: PreTrainedModel, share: float) -> dict[str, Any]:
    """`count` by a share of the usual lengths."""
    few, some, half, whole = (int(length * share) for length in (*FEW, *LENGTHS))
    one, two = _alive(model, (1, few)), _alive(model, (2, few))
    # Of the pass itself, such as weights that are unpacked; it does not grow.
    constant = max(2 * one - two, 0)
    lengths = (few, some, half, whole)
    taken = {length: _alive(model, (1, length)) - constant for length in lengths}
    token, pair, row = _fitted((half, taken[half]), (whole, taken[whole]))
    filled, short, short_pair = 1, 0.0, 0.0
    if taken[some] < taken[few] * some / few / 2:
        filled = some
        while 2 * filled <= half and taken[some] > 1.5 * (token * filled + row):
            filled *= 2
    else:
        short_pair = max((taken[some] / some - taken[few] / few) / (some - few), 0.0)
        short = taken[some] / some - short_pair * some
    scored, score = _scores(model, (PAIRED[0], max(int(PAIRED[1] * share), 2)))
    kept_token, kept_row = _kept(model, (few, some))
    found = Counted(
        item=model.dtype.itemsize,
        token=round(token, 3),
        pair=round(pair, 3),
        short=round(short, 3),
        short_pair=round(short_pair, 3),
        row=row,
        scored=round(scored, 3),
        score=round(score, 3),
        filled=filled,
        kept_token=kept_token,
        kept_row=kept_row,
    )
    return asdict(found)


def _fitted(half: tuple[int, int], whole: tuple[int, int]) -> tuple[float, float, int]:
    """Bytes of a token, of a pair and of a row by two lengths and what they took, the one twice the other."""
    (length, less), (_, more) = half, whole
    if more >= 2 * less:
        pair = (more - 2 * less) / (2 * length**2)
        return less / length - pair * length, pair, 0
    token = (more - less) / length
    return token, 0.0, round(less - token * length)


class _Alive(TorchDispatchMode):
    """Bytes of storages that came while it looked and are alive: now, and at most."""

    def __init__(self, model: PreTrainedModel, length: int = 0) -> None:
        """Look at passes over rows of `length` tokens, by which pairs of them are known; 0: by nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        own = (*model.parameters(), *model.buffers())
        self._there = {one.untyped_storage()._cdata for one in own}
        # Weights that are brought for each pass are known by their shapes.
        self._brought = {one.shape for one in own} if offloaded(model) else set()
        self._sizes: dict[int, tuple[int, int]] = {}
        self._pair_sizes = (length**2, length * (length + 1)) if length else ()
        self._now = self._pairs = 0
        self.most = 0
        # When most of pairs was there: bytes of them, and of all.
        self.most_pairs = (0, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if tensor.shape in self._brought:
                self._there.add(storage._cdata)
                weakref.finalize(storage, self._there.discard, storage._cdata)
            self._see(storage, tensor.itemsize)
        return made

    def _see(self, storage: torch.UntypedStorage, item: int) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._there or key in self._sizes:
            return
        paired = bool(size) and any(size // item % pairs == 0 for pairs in self._pair_sizes)
        self._sizes[key] = (size, size * paired)
        self._now += size
        self._pairs += size * paired
        self.most = max(self.most, self._now)
        if self._pairs:
            self.most_pairs = max(self.most_pairs, (self._pairs, self._now))
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, paired = self._sizes.pop(key, (0, 0))
        self._now -= size
        self._pairs -= paired


class _AtTheHead(Exception):
    """A pass has come to the head."""


def _stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise _AtTheHead


@torch.no_grad()
def _seen(model: PreTrainedModel, shape: tuple[int, int]) -> _Alive:
    """What was alive in a pass over random tokens [rows, tokens] on its way to the head."""
    ids = random_ids(model, shape)
    handle = model.get_output_embeddings().register_forward_pre_hook(_stop)
    seen = _Alive(model, shape[1])
    try:
        with seen, suppress(_AtTheHead):
            # Past the hooks on the model itself, which count an evaluation's passes.
            model.forward(ids, **without_cache(model))
    finally:
        handle.remove()
    return seen


def _alive(model: PreTrainedModel, shape: tuple[int, int]) -> int:
    """Bytes that a pass over random tokens [rows, tokens] holds at most on its way to the head."""
    return _seen(model, shape).most


def _scores(model: PreTrainedModel, shape: tuple[int, int]) -> tuple[float, float]:
    """Bytes of a token and of a pair when most of what a pass has of pairs is there."""
    rows, length = shape
    pairs, every = _seen(model, shape).most_pairs
    return (every - pairs) / (rows * length), pairs / (rows * length**2)


@torch.no_grad()
def _kept(model: PreTrainedModel, lengths: tuple[int, int]) -> tuple[int, int]:
    """Bytes that a cache keeps of a token and of a row; none where it has none, or refuses to."""
    if not without_cache(model):
        return 0, 0
    sizes = []
    for length in lengths:
        try:
            made = model.forward(random_ids(model, (1, length)), use_cache=True)
        except REFUSALS:
            return 0, 0
        beside = {name: one for name, one in made.items() if name != "logits"}
        storages = {one.untyped_storage()._cdata: one for one in _tensors(beside, DEPTH)}
        sizes.append(sum(one.nbytes for one in storages.values()))
    token = max((sizes[1] - sizes[0]) // (lengths[1] - lengths[0]), 0)
    return token, max(sizes[0] - token * lengths[0], 0)


def _tensors(held: Any, depth: int) -> Iterator[Tensor]:
    """Tensors in containers and attributes of caches."""
    if isinstance(held, Tensor):
        yield held
    elif depth:
        if isinstance(held, dict):
            inner = list(held.values())
        elif isinstance(held, list | tuple):
            inner = list(held)
        else:
            inner = list(getattr(held, "__dict__", {}).values())
        for one in inner:
            yield from _tensors(one, depth - 1)
