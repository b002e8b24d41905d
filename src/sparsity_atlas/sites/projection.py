"""A linear map of a model.

A quantised map holds its weight packed, under any name and in any type, and computes with it in a way of its
own. So a weight is read only where it is plainly the matrix that the map multiplies with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.offloading import device_of, present

# Types that weights and activations have where they are numbers.
COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        module: Any = self.module
        # Classes of quantised maps are Linear, too, and hold bytes, or compute with what is no bare weight.
        # accelerate puts a forward of its own around that of a map whose weights wait elsewhere.
        forward = getattr(module, "_old_forward", module.forward)
        if getattr(forward, "__func__", None) is not nn.Linear.forward:
            return None
        weight = getattr(module, "weight", None)
        if weight is None or weight.shape != (module.out_features, module.in_features):
            return None
        if weight.dtype not in COMPUTED:
            return None
        with present(module):
            weight = module.weight.detach()
        return self.columns(weight.T).T

    def like(self, model: nn.Module) -> Tensor:
        """An empty tensor of the type and on the device that the map's input has.

        Args:
            model: the map's own, whose type it is where the map is packed.
        """
        module = self.module
        held = [one for one in module.parameters() if one.dtype in COMPUTED and one.dim() >= 2]
        packed = next(module.parameters(), None) is None
        device = next(module.buffers(), torch.empty(0)).device if packed else device_of(module)
        every = (one.dtype for one in (*held, *model.parameters()) if one.dtype in COMPUTED)
        return torch.empty(0, dtype=next(every, torch.float32), device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """What the map makes of x, past all hooks."""
        # forward() and not the module itself: hooks see only what the model computes.
        return self.columns(self.module.forward(x))
