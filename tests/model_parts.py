"""Parts of models by kind, and callbacks that tests write by layer and tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from sparsity_atlas.sites.attention import Attention
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.find import Part, Vectors, find_parts
from sparsity_atlas.terms import PlaceKey

T = TypeVar("T")


def ffns_of(parts: list[Part]) -> list[FFN]:
    """The dense FFNs, layer by layer."""
    return [part for part in parts if isinstance(part, FFN)]


def attentions_of(parts: list[Part]) -> list[Attention]:
    """What attention was found, layer by layer."""
    return [part for part in parts if isinstance(part, Attention)]


def find_ffns(model: nn.Module, modules: dict[str, str] | None = None) -> list[FFN]:
    """The dense FFNs that a search proves."""
    return ffns_of(find_parts(model, modules))


def shown(act: Callable[..., Any]) -> Callable[..., Any]:
    """A callback that takes the layer, the tensor's name and its values (and what to write)."""

    def callback(vectors: Vectors, *write: Tensor) -> Any:
        return act(vectors.part.layer, vectors.tensor, vectors.values, *write)

    return callback


def by_tensor(places: Mapping[PlaceKey, T]) -> dict[tuple[int, str], T]:
    """What is known of places, by layer and tensor; of a dense model, whose tensors' names tell the part."""
    return {(key.layer, key.tensor): value for key, value in places.items()}
