"""One of a layer's routed experts as criteria see it: with the weights that it alone has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparsity_atlas.sites.activation import Activation
from sparsity_atlas.sites.experts.gating import Columns
from sparsity_atlas.sites.experts.routed import RoutedExperts
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import EXPERTS


@dataclass(frozen=True)
class ExpertMap(Projection):
    """A linear map of one expert.

    Attributes:
        expert: its number.
        stacked: the module's parameter that holds this map of all experts.
        part: the columns of what it makes that count; None for all.
    """

    expert: int = 0
    stacked: str = ""
    part: Columns | None = None

    def columns(self, output: Tensor) -> Tensor:
        """See `Projection.columns`."""
        return output if self.part is None else self.part.of(output)

    def weight(self) -> Tensor:
        """See `Projection.weight`."""
        return self.columns(self._by_input()).T

    def _by_input(self) -> Tensor:
        """[inputs, all that the parameter makes]."""
        module: Any = self.module
        weight: Tensor = getattr(module, self.stacked)[self.expert].detach()
        return weight if module.is_transposed else weight.T

    def __call__(self, x: Tensor) -> Tensor:
        """What the map makes of x."""
        module: Any = self.module
        made = x @ self._by_input()
        if module.has_bias:
            made = made + getattr(module, f"{self.stacked}_bias")[self.expert].detach()
        return self.columns(made)


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert of a layer. A `Holder`.

    Attributes:
        layer: index of the decoder's layer.
        number: which of the layer's experts.
        routed: all of them.
        activation: their nonlinearity, if it is known.
        model: whose layer it is.
    """

    layer: int
    number: int
    routed: RoutedExperts
    activation: Activation | None
    model: nn.Module = field(repr=False)

    @property
    def name(self) -> str:
        """See `Holder`."""
        return EXPERTS

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `Holder.tensors`."""
        return self.routed.tensors

    def rows_are_tokens(self, tensor: str) -> bool:
        """See `Holder.rows_are_tokens`: an expert sees some tokens of a sequence."""
        return False

    def routing(self, tensor: str) -> None:
        """See `Holder.routing`: all its rows are its own."""

    @property
    def experts(self) -> tuple[()]:
        """See `Holder.experts`."""
        return ()

    def readers(self, tensor: str) -> tuple[Projection, ...]:
        """See `Holder.readers`."""
        if tensor != "input":
            return (self._map("down_proj"),)
        gating = self.routed.gating
        if gating is None:
            return (self._map("up_proj"),)
        factors = (gating.linear, gating.nonlinear)
        return tuple(self._map("gate_up_proj", columns) for columns in factors)

    def _map(self, stacked: str, part: Columns | None = None) -> ExpertMap:
        path = f"{self.routed.path}.{stacked}[{self.number}]"
        return ExpertMap(path, self.routed.module, None, self.number, stacked, part)

    def size(self, tensor: str) -> int:
        """See `Holder.size`."""
        return self.routed.hidden if tensor == "input" else self.routed.width

    def outputs(self, tensor: str) -> int:
        """See `Holder.outputs`."""
        if tensor != "input":
            return self.routed.hidden
        return self.routed.width if self.routed.gating is None else 2 * self.routed.width
