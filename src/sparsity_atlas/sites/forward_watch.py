"""Check that hooks fire once, as expected, in every forward pass of a model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError, UnknownTokens
from sparsity_atlas.terms import PlaceKey


class ForwardWatch:
    """Watches the model's own forward passes: the batch's shape, and how often each hook fired."""

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        self.counts: dict[tuple[PlaceKey, str], int] = {}
        self.batch: tuple[int, int] | None = None
        self.running = False
        self.kept: dict[PlaceKey, Tensor] = {}
        """Tensors that a later hook of the same pass and part needs."""
        for handle in (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ):
            stack.callback(handle.remove)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = next(
            (
                value
                for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
                if isinstance(value, Tensor) and value.dim() >= 2
            ),
            None,
        )
        self.batch = None if ids is None else (ids.shape[0], ids.shape[1])
        self.counts = dict.fromkeys(self.counts, 0)
        self.kept.clear()
        self.running = True

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.running = False
        self.kept.clear()
        for (place, path), count in self.counts.items():
            if count != 1:
                raise AtlasError(
                    f"layer {place.layer}: {place.tensor} (at {path}) passed {count} times in one "
                    "forward pass of the model, expected once: layers that run more than once, or not at "
                    "all, are not supported"
                )

    def fired(self, key: tuple[PlaceKey, str]) -> None:
        """Count one firing of the hook on a module's path for a place."""
        if not self.running:
            place, path = key
            raise AtlasError(
                f"layer {place.layer}: {place.tensor} (at {path}) ran outside a forward pass of the model "
                "itself: call the model, not one of its parts"
            )
        self.counts[key] += 1

    def by_token(self, tensor: Tensor, place: str) -> Tensor:
        """The tensor as [batch, tokens, width]; some models flatten the first two."""
        if self.batch is None or tensor.shape[:-1] == self.batch:
            return tensor
        if tensor.shape[:-1] == (self.batch[0] * self.batch[1],):
            by_token: Tensor = tensor.unflatten(0, self.batch)
            return by_token
        raise UnknownTokens(
            f"{place}: found a tensor of shape {list(tensor.shape)} where {self.batch[0]} × "
            f"{self.batch[1]} tokens went in; packed or transposed batches are not supported"
        )
