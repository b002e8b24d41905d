"""The products of `decoding` that do what a part's maps do, and why a part has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsity_atlas.decoding.backend import ACTIVATIONS, activated
from sparsity_atlas.decoding.maps import SITES, GatedFFN, InputMap
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models.logits.head import EXACT
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.shaping import PLAIN
from sparsity_atlas.speed.proved_matrix import matrix_of
from sparsity_atlas.speed.speed_table import NO_EXPERTS
from sparsity_atlas.terms import EXPERTS, TENSORS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparsity_atlas.sites.part import Part
    from sparsity_atlas.sites.projection import Projection

# Tensors that maps read as they are; of the others a product makes what the maps behind them read.
READ = ("input", "intermediate", "qkv_input", "o_input")


class Joined(NamedTuple):
    """All maps that read one tensor, as one product.

    Attributes:
        product: its rows are those of the maps, one behind the other.
        readers: the maps by path.
        sizes: outputs of each.
    """

    product: InputMap
    readers: dict[str, Projection]
    sizes: list[int]


def readers_of(part: Part, tensor: str) -> dict[str, Projection]:
    """The maps that read a tensor, by path, each with a matrix of its own.

    Raises:
        AtlasError: nothing reads it as it is, or a map for two factors, or routed experts do.
    """
    if part.name == EXPERTS:
        raise AtlasError(NO_EXPERTS)
    if tensor not in READ:
        raise AtlasError(f"layer {part.layer}: {tensor}: there is no second factor to leave out")
    readers = {reader.path: reader for reader in part.readers(tensor)}
    for path, reader in readers.items():
        if reader.half is not None:
            raise AtlasError(f"{path}: its matrix makes two factors")
    if not readers:
        raise AtlasError(f"layer {part.layer}: {part.name}: its maps are not read one by one")
    return readers


def joined(part: Part, tensor: str) -> Joined:
    """The maps that read a tensor, with a copy of their weights.

    Raises:
        AtlasError: as of `readers_of`, or a map is packed.
    """
    readers = readers_of(part, tensor)
    weights, biases = [], []
    for reader in readers.values():
        weight = matrix_of(reader)
        weights.append(weight)
        bias = _bias(reader)
        biases.append(weight.new_zeros(len(weight)) if bias is None else bias)
    bias = torch.cat(biases)
    product = InputMap(torch.cat(weights), bias if bool(bias.any()) else None)
    return Joined(product, readers, [len(weight) for weight in weights])


class Gated(NamedTuple):
    """What a plain gated FFN is made of: W_u, W_g, W_d and the name of σ."""

    up: Tensor
    gate: Tensor
    down: Tensor
    activation: str


def gated_of(part: FFN) -> Gated:
    """A gated FFN of plain maps, with a nonlinearity that the products know.

    Raises:
        AtlasError: it is of another form.
    """
    assert part.gate is not None
    up, gate, down = (plain_weight(reader) for reader in (part.up, part.gate, part.down))
    name = name_of(part.activation)
    if name is None or part.norm is not None or part.shaping != PLAIN:
        raise AtlasError(
            f"layer {part.layer}: its FFN is none of plain maps with {' or '.join(ACTIVATIONS)}"
        )
    return Gated(up, gate, down, name)


def gated(part: FFN, tensors: Sequence[str]) -> GatedFFN:
    """A gated FFN, masked at some of its tensors, with the model's own weights.

    Raises:
        AtlasError: as of `gated_of`.
    """
    (site,) = [one for one in SITES if TENSORS[one] == tuple(tensors)]
    return GatedFFN(*gated_of(part), site)


def plain_weight(reader: Projection) -> Tensor:
    """The matrix of a map that has nothing else.

    Raises:
        AtlasError: it has.
    """
    if _bias(reader) is not None:
        raise AtlasError(f"{reader.path}: it has a bias, which no product of a whole FFN adds")
    return matrix_of(reader)


def _bias(reader: Projection) -> Tensor | None:
    bias: Any = getattr(reader.module, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None


def name_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Which of the nonlinearities that the products know this is, by what it makes of some numbers."""
    values = torch.linspace(-6, 6, 97)
    found = activation(values)
    for name in ACTIVATIONS:
        if torch.allclose(found, activated(values, name), atol=EXACT, rtol=EXACT):
            return name
    return None
