"""A linear map of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sparsity_atlas.sites.offloading import present


@dataclass(frozen=True)
class Projection:
    """The linear map that makes one factor: a module's whole output, or one half of its columns."""

    path: str
    module: nn.Module
    half: int | None = None

    def columns(self, output: Tensor) -> Tensor:
        """This factor's columns [..., d_ff] of the module's output."""
        return output if self.half is None else output.chunk(2, dim=-1)[self.half]

    def weight(self) -> Tensor | None:
        """Its weight [outputs, inputs]; None where the module holds it in a way of its own."""
        if not isinstance(self.module, nn.Linear):
            return None
        with present(self.module):
            weight = self.module.weight.detach()
        # Classes of quantised maps are Linear, too, and hold bytes.
        plain = weight.shape == (self.module.out_features, self.module.in_features)
        if not (plain and weight.is_floating_point()):
            return None
        return self.columns(weight.T).T

    def __call__(self, x: Tensor) -> Tensor:
        """What the map makes of x, past all hooks."""
        # forward() and not the module itself: hooks see only what the model computes.
        return self.columns(self.module.forward(x))
