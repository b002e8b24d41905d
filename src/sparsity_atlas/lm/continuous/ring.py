"""Keys and values of rows that began at different times, in buffers that all rows write in step.

All rows write their next token at one place of the buffers, the clock, which comes round. What a row holds
are the last places behind the clock, as many as it has tokens. So nothing ever moves: a new prompt is
written to the places behind the clock, and an attention mask says how many of them are whose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class Ring(Cache):
    """The cache of a model that is given one token of each row a pass, or whole prompts of some rows.

    Attributes:
        rows: how many there are.
        size: tokens that a row can hold.
        clock: where the next token of all rows is written, int64 [1].
    """

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.rows, self.size = rows, size
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self._prompts: _Prompts | None = None

    @contextmanager
    def prompts(self, rows: Tensor, columns: Tensor, valid: Tensor) -> Iterator[None]:
        """Within: a pass over whole prompts, which see nothing but themselves.

        Args:
            rows: int64 [n], which ones they become; what these held is gone.
            columns: int64 [longest], where their tokens are put.
            valid: bool [n, longest], False where padding is.
        """
        self._prompts = rows, columns, valid
        try:
            yield
        finally:
            self._prompts = None

    @property
    def steps(self) -> bool:
        """Whether a pass is over one token of each row."""
        return self._prompts is None

    def buffers(self, layer_idx: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer [rows, heads, size, width], for whoever writes at the clock itself.

        Args:
            layer_idx: the layer.
            like: [rows, heads, tokens, width], of the type and on the device of what they hold.
        """
        return self._layer(layer_idx).buffers(like, like)

    def _layer(self, layer_idx: int) -> _Layer:
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer(self))
        layer = self.layers[layer_idx]
        assert isinstance(layer, _Layer)
        return layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put in what a pass has made in one layer; returns what its tokens may see."""
        self._layer(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def age(self) -> Tensor:
        """How many tokens ago each place was written, int64 [size]: 0 where this pass writes."""
        place = torch.arange(self.size, device=self.clock.device)
        return (self.clock - place) % self.size


# Rows, columns, and what of them is no padding.
_Prompts = tuple[Tensor, Tensor, Tensor]


class _Layer(CacheLayerMixin):
    """Keys and values [rows, heads, size, width] of one layer."""

    is_sliding = False

    def __init__(self, ring: Ring) -> None:
        CacheLayerMixin.__init__(self)
        self._ring = ring

    def buffers(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, made when they are first asked for, as wide as these; see `Ring.buffers`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for what has the shape of these."""
        rows, size = self._ring.rows, self._ring.size
        self.keys, self.values = (
            one.new_zeros(rows, one.shape[1], size, one.shape[3])
            for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put in what a pass has made; returns what its tokens may see.

        Args:
            key_states: [rows, heads, tokens, width].
            value_states: likewise.
            args: what a class adds, which is not needed.
            kwargs: likewise.
        """
        keys, values = self.buffers(key_states, value_states)
        if self._ring._prompts is None:
            keys.index_copy_(2, self._ring.clock, key_states)
            values.index_copy_(2, self._ring.clock, value_states)
            return keys, values
        rows, columns, valid = self._ring._prompts
        for kept, made in ((keys, key_states), (values, value_states)):
            # Zeros where there is nothing: what a mask hides is multiplied by zero, which NaN would survive.
            # Not by an assignment, which copies the number to a GPU and waits for it.
            kept.index_fill_(0, rows, 0)
            kept[rows[:, None], :, columns] = torch.where(
                valid[..., None, None], made.transpose(1, 2), 0
            )
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a pass can see, and the place of the first."""
        return (self._ring.size if self._ring._prompts is None else query_length), 0

    def get_seq_length(self) -> int:
        """Tokens before those of a prompt."""
        return 0

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self._ring.size
