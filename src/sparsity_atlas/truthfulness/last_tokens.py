"""The vectors of a sequence's last token in every layer, and how likely its answer was, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.models.logits import head
from sparsity_atlas.models.logits.likelihoods import likelihoods
from sparsity_atlas.sites.block import layer_path
from sparsity_atlas.sites.find import observe_places
from sparsity_atlas.sites.part import by_layer
from sparsity_atlas.terms import RESIDUAL, PlaceKey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsity_atlas.sites.find import Part, Vectors

Place = tuple[str, int]
"""A tensor, or the residual stream behind a layer, and the layer."""


@dataclass(frozen=True)
class Prompted:
    """Token ids of a prompt and an answer.

    Attributes:
        tokens: int64 [tokens], one at least.
        answered: of these the last so many, the answer's.
    """

    tokens: np.ndarray
    answered: int


def places(parts: Sequence[Part], tensors: Sequence[str]) -> dict[Place, int]:
    """Where vectors of single tokens are, with their widths, in the order of tensors and layers.

    Args:
        parts: all of one model.
        tensors: names of tensors, and `RESIDUAL`.

    Raises:
        AtlasError: no layer has such a tensor of which each token has one vector.
    """
    found: dict[Place, int] = {}
    for tensor in tensors:
        own = {}
        for layer, beside in by_layer(parts).items():
            if tensor == RESIDUAL and layer_path(layer, parts):
                own[tensor, layer] = next(one.size("input") for one in beside)
            elif (part := _whose(beside, tensor)) is not None:
                own[tensor, layer] = part.size(tensor)
        if not own:
            raise AtlasError(
                f"studies.truthfulness.tensors: no layer has '{tensor}' with one vector a token"
            )
        found |= own
    return found


def _whose(beside: Sequence[Part], tensor: str) -> Part | None:
    """The first of a layer's parts of which each token has one such vector."""
    fitting = (one for one in beside if tensor in one.tensors and one.rows_are_tokens(tensor))
    return next(fitting, None)


def run(
    parts: Sequence[Part], wanted: Sequence[Place], sequences: Sequence[Prompted], padding: int
) -> tuple[dict[Place, Tensor], np.ndarray]:
    """One forward pass over some sequences.

    What stands behind a token does not change it, so that rows are filled up at their end.

    Args:
        parts: all of one model.
        wanted: of `places`.
        sequences: the batch.
        padding: token that rows are filled up with.

    Returns:
        At each place [sequences, width], in the model's type on the CPU, and the mean log-probability of
        each answer's tokens, float64 [sequences]; NaN for an answer of which no token has one before it.

    Raises:
        NumericalFailure: NaN or an infinity in a vector or a log-probability.
    """
    model: Any = parts[0].model
    longest = max(len(one.tokens) for one in sequences)
    ids = np.full((len(sequences), longest), padding, np.int64)
    for row, one in zip(ids, sequences, strict=True):
        row[: len(one.tokens)] = one.tokens
    rows = np.arange(len(sequences)) * longest
    last = torch.from_numpy(rows + [len(one.tokens) - 1 for one in sequences])
    # Of each answer's tokens, where the one before it is.
    spans = [np.arange(max(len(o.tokens) - o.answered, 1), len(o.tokens)) for o in sequences]
    before = np.concatenate([row + span - 1 for row, span in zip(rows, spans, strict=True)])
    targets = np.concatenate([o.tokens[span] for o, span in zip(sequences, spans, strict=True)])
    able = head.able(model)  # found out before anything is attached
    found: dict[Place, Tensor] = {}

    def keep(place: Place, values: Tensor) -> None:
        # [rows, longest, width], or all of its tokens one behind the other.
        flat = values.reshape(-1, values.shape[-1])
        if len(flat) != ids.size or place in found:
            raise AtlasError(
                f"{place[0]} of layer {place[1]}: {list(values.shape)} is not a vector for each of "
                f"{ids.shape[0]} x {ids.shape[1]} tokens, once in a pass"
            )
        found[place] = flat[last.to(flat.device)].cpu()

    def call() -> Tensor:
        device = model.get_input_embeddings().weight.device
        logits: Tensor = model(torch.from_numpy(ids).to(device), **head.without_cache(model)).logits
        return logits

    with torch.no_grad(), _watched(parts, wanted, keep):
        pieces = head.logits(model, call, torch.from_numpy(before), select=able)
        values, _ = likelihoods(pieces, np.arange(len(targets)), targets)
    likely = np.array(
        [
            float(own.mean()) if len(own) else np.nan
            for own in values.cpu().double().split([len(span) for span in spans])
        ]
    )
    told = np.array([len(span) > 0 for span in spans])
    if not (np.isfinite(likely[told]).all() and all(map(_is_finite, found.values()))):
        raise NumericalFailure("NaN or infinity in the vectors of last tokens or their likelihoods")
    return found, likely


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


@contextmanager
def _watched(
    parts: Sequence[Part], wanted: Sequence[Place], keep: Callable[[Place, Tensor], None]
) -> Iterator[None]:
    """Show what is at some places to `keep`."""
    model: PreTrainedModel | Any = parts[0].model
    layers = by_layer(parts)
    observed = []
    with ExitStack() as stack:
        for tensor, layer in wanted:
            if tensor == RESIDUAL:
                module = model.get_submodule(layer_path(layer, parts))
                stack.callback(_show(module, (tensor, layer), keep))
            else:
                part = _whose(layers[layer], tensor)
                assert part is not None, "one of `places`"
                observed.append((part, tensor))

        def shown(vectors: Vectors) -> None:
            key: PlaceKey = vectors.key
            keep((key.tensor, key.layer), vectors.values)

        stack.enter_context(observe_places(model, observed, shown))
        yield


def _show(
    module: nn.Module, place: Place, keep: Callable[[Place, Tensor], None]
) -> Callable[[], None]:
    """Have a layer's output shown; returns what ends it."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        keep(place, output if isinstance(output, Tensor) else output[0])

    return module.register_forward_hook(hook).remove
