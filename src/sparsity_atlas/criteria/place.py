"""Where a criterion works: one tensor of one layer, the maps that read it, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.terms import ATTENTION, FFN, TENSORS, PlaceKey

if TYPE_CHECKING:
    from sparsity_atlas.sites.part import Holder, Part
    from sparsity_atlas.sites.projection import Projection

# Unit vectors that go through a map at once, where its weight is no plain matrix.
UNIT_VECTORS = 512
# Random vectors that such a map is tried with, and the relative error that rounding its input explains, which
# may be to 8 bits.
TRIED, READ = 8, 0.1
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Place:
    """One tensor of one part of a layer, or of one expert."""

    part: Holder
    tensor: str

    @property
    def key(self) -> PlaceKey:
        """Which it is."""
        return PlaceKey(self.part.layer, self.part.name, self.tensor)

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.part.layer

    @property
    def width(self) -> int:
        """Entries of a row."""
        routing = self.part.routing(self.tensor)
        return self.part.size(self.tensor) if routing is None else routing.width

    @property
    def experts(self) -> tuple[Place, ...]:
        """The place within each of the experts that its rows are spread over; none if they are not."""
        return tuple(Place(expert, self.tensor) for expert in self.part.experts)

    @property
    def device(self) -> torch.device:
        """Where masks are made: with the model, on the CPU where it has no float64 (Apple's MPS)."""
        device = self._like.device
        return torch.device("cpu") if device.type == "mps" else device

    @cached_property
    def _like(self) -> Tensor:
        """Empty, of the type and on the device that the maps read."""
        return self.readers()[0].like(self.part.model)

    def readers(self) -> tuple[Projection, ...]:
        """The maps that a dropped entry saves work in: W_u and W_g of x, W_d of u, g and u ⊙ g."""
        return self.part.readers(self.tensor)

    @cached_property
    def weight(self) -> Tensor:
        """The readers' weights, one above the other: float32 [outputs, width].

        Raises:
            AtlasError: a packed map, of which no plain numbers tell what it does.
        """
        found = [matrix(reader, self.width, self._like) for reader in self.readers()]
        return torch.cat(found).to(self.device)

    def outputs(self, values: Tensor) -> Tensor:
        """What the readers make of rows [rows, width], biases included: float32 [rows, outputs]."""
        made = [reader(values.to(self._like)) for reader in self.readers()]
        return torch.cat(made, -1).float().to(self.device)

    def product(self, values: Tensor) -> Tensor:
        """values @ weightᵀ, without biases: [rows, outputs] of float32 [rows, width]."""
        return values @ self.weight.T

    def column_norms(self) -> Tensor:
        """‖W[:, j]‖₂ of the readers' weight for each entry: float32 [width]."""
        norms: Tensor = self.weight.norm(dim=0)
        return norms


@dataclass(frozen=True, eq=False)
class SpreadPlace(Place):
    """A place whose rows are those of several experts, when it is asked about certain rows.

    Attributes:
        of_row: int [rows], the expert of each row.
    """

    of_row: Tensor

    @cached_property
    def experts(self) -> tuple[Place, ...]:
        """See `Place.experts`: kept, and with them their weights."""
        return super().experts

    def column_norms(self) -> Tensor:
        """‖W[:, j]‖₂ of what reads each row: float32 [rows, width]."""
        return torch.stack([expert.column_norms() for expert in self.experts])[self.of_row]

    def product(self, values: Tensor) -> Tensor:
        """See `Place.product`: of each row with its expert's weight."""
        return self._by_expert(values, lambda expert, rows: expert.product(rows))

    def outputs(self, values: Tensor) -> Tensor:
        """See `Place.outputs`: of each row by its expert's maps."""
        return self._by_expert(values, lambda expert, rows: expert.outputs(rows))

    def _by_expert(self, values: Tensor, make: Callable[[Place, Tensor], Tensor]) -> Tensor:
        made = values.new_empty(len(values), self.experts[0].part.outputs(self.tensor))
        for number, expert in enumerate(self.experts):
            own = (self.of_row == number).nonzero().flatten()
            made[own] = make(expert, values[own])
        return made


def matrix(projection: Projection, width: int, like: Tensor) -> Tensor:
    """A linear map's weight as float32 [outputs, width], whatever its module calls and shapes it.

    A map that does not hold it as such tells its columns by what it makes of the unit vectors: so the weight
    of a quantised map is what it stands for.

    Args:
        projection: the map.
        width: entries of what it reads.
        like: of the type and on the device of that.

    Raises:
        AtlasError: what it makes of other vectors is not what these columns say.
    """
    weight = projection.weight()
    if weight is not None:
        return weight.float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        zero = like.new_zeros(1, width)
        bias = projection(zero).float()
        rows = [
            projection(unit).float() - bias
            for unit in torch.eye(width, dtype=like.dtype, device=like.device).split(UNIT_VECTORS)
        ]
        found = torch.cat(rows).T
        tried = torch.randn(TRIED, width, generator=generator).to(like)
        made, expected = projection(tried).float() - bias, tried.float() @ found.T
    error = float((made - expected).norm() / expected.norm().clamp_min(torch.finfo().tiny))
    # Written so that NaN fails.
    if not error <= READ:
        raise AtlasError(
            f"{projection.path} ({type(projection.module).__name__}): its weights cannot be read: they are "
            "packed, and what it makes of a vector is not the sum of its columns (relative error "
            f"{error:.2g}); take criteria that read no weights, or load the model with dequantise: true"
        )
    return found


def relative(norms: Tensor) -> Tensor:
    """Weights that order entries as these norms do: 1 where all are equal, which rounds nothing."""
    largest = norms.max()
    return norms / torch.where(largest > 0, largest, 1.0)


def places(parts: Sequence[Part], site: str) -> Iterator[Place]:
    """The places of a site, layer by layer in the order of a forward pass."""
    for part in parts:
        for tensor in TENSORS[site]:
            if tensor in part.tensors:
                yield Place(part, tensor)


def state_name(key: PlaceKey, expert: int | None = None) -> str:
    """A place's name in a calibration; of one of its experts, where these have states of their own."""
    # Of what a dense layer holds, the tensor's name tells the part.
    part = "" if key.part in (ATTENTION, FFN) else f".{key.part}"
    return f"{key.tensor}.{key.layer}{part}" + ("" if expert is None else f".e{expert}")


class Sample(Protocol):
    """The captured activations of one part."""

    def read(self, tensor: str) -> Tensor:
        """One tensor of the part: float32 [tokens, width] on the place's device."""
