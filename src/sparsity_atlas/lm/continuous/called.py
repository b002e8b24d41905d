"""A model as it is called with a cache of ours: the names of its arguments, and its masks."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas.lm.forward import Masks, before_head, reach_by_layer
from sparsity_atlas.models.logits import head

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsity_atlas.lm.continuous.ring import Ring

# As transformers calls the argument, and as it did before.
CACHE = ("cache", "past_key_values")


def arguments(model: PreTrainedModel) -> set[str]:
    """Names of what a model's forward pass takes."""
    return set(inspect.signature(model.forward).parameters)


class Called:
    """A causal model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.device = model.device
        self._config = model.config.get_text_config()
        self._arguments = arguments(model)

    def _options(self, positions: Tensor, mask: Any, ring: Ring) -> dict[str, Any]:
        cache = next(name for name in CACHE if name in self._arguments)
        return {
            "position_ids": positions,
            "attention_mask": mask,
            "use_cache": True,
            cache: ring,
        }

    def next_logits(self, ids: Tensor, positions: Tensor, mask: Any, ring: Ring) -> Tensor:
        """Logits of what follows each row [rows, vocabulary]; hooks on the model see a pass.

        Args:
            ids: [rows, tokens].
            positions: of these, [rows, tokens].
            mask: bool [rows, tokens], False where padding is, of whole prompts; else what `masks` gives.
            ring: keys and values of the rows.
        """
        options = {**self._options(positions, mask, ring), **head.of_the_last(self._model)}
        with torch.no_grad(), head.shown_the_last(self._model):
            logits: Tensor = self._model(ids, **options).logits[:, -1]
        return logits

    def hidden(self, ids: Tensor, positions: Tensor, mask: Any, ring: Ring) -> Tensor:
        """As `next_logits`, past the model's hooks: what its head would get, [rows, tokens, hidden]."""
        with torch.no_grad():
            return before_head(self._model, ids, **self._options(positions, mask, ring))

    def plain(self, ids: Tensor) -> Tensor:
        """What the head would get of sequences without padding or cache, [rows, tokens, hidden]."""
        with torch.no_grad():
            return before_head(self._model, ids, **head.without_cache(self._model))

    def masks(self, age: Tensor, lengths: Tensor, masks: Masks) -> Tensor | dict[str, Tensor]:
        """Who is seen by each row's next token.

        Args:
            age: of the places of a ring, int64 [size].
            lengths: of the rows, int64 [rows].
            masks: what the model wants.

        Returns:
            What is added to attention scores, [rows, 1, 1, size], for each type of layer where they differ.
        """
        config = self._config
        if masks is Masks.BY_LAYER:
            return {
                kind: self._mask(age, lengths, *reach)
                for kind, reach in reach_by_layer(config).items()
            }
        window = config.sliding_window if masks is Masks.WINDOWED else None
        return self._mask(age, lengths, window)

    def _mask(
        self, age: Tensor, lengths: Tensor, window: int | None, chunk: int | None = None
    ) -> Tensor:
        reach = lengths if window is None else lengths.clamp(max=window)
        if chunk is not None:
            reach = (reach - 1) % chunk + 1
        dtype = self._model.dtype
        hidden = (age >= reach[:, None])[:, None, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=age.device).masked_fill_(
            hidden, torch.finfo(dtype).min
        )
